"""What a study measured: the schema that its writer fills and every reader parses.

A study trains some arms (a model tuned in one way) with some seeds and scores every run on the same held-out examples.
Nothing derived is stored: means, differences and intervals are computed from the runs (`pesc.report.findings`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from annotated_types import Ge, Len
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

RESULTS, METRICS = "results.json", "metrics.jsonl"
SCHEMA = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")
LENIENT = ConfigDict(extra="ignore")  # their writer has more to say than we read
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float. NaN and infinity are written as such; null, which other writers put in their place, is read as NaN."""
T = TypeVar("T")


@dataclass(frozen=True, config=SCHEMA)
class Parameters:
    """Numbers of parameters of a model: all, those that compute one token, those that training changes."""

    total: int
    active: int
    trained: int


@dataclass(frozen=True, config=LENIENT)
class Training:
    """What a training run took."""

    steps: int
    tokens: int
    seconds: Number
    peak_memory_gb: Number


@dataclass(frozen=True, config=SCHEMA)
class ExpertCounts:
    """How often each expert was chosen on the held-out examples."""

    num_experts_per_tok: list[int | None]
    """Experts chosen for a token, for each decoder layer; None for a layer without experts."""
    counts: dict[str, list[list[int] | None]]
    """By domain and decoder layer: for each expert, the number of tokens that chose it."""

    def __post_init__(self) -> None:
        wanted = [chosen is not None for chosen in self.num_experts_per_tok]
        sizes = {name: [layer and len(layer) for layer in layers] for name, layers in self.counts.items()}
        for name, found in sizes.items():
            if [size is not None for size in found] != wanted:
                raise ValueError(f"counts.{name} must have experts in the layers in which num_experts_per_tok is given")
            if found != next(iter(sizes.values())):
                raise ValueError(f"counts.{name} has {found} experts in its layers, another domain has others")

    @property
    def layers(self) -> list[int]:
        """Indices of the decoder layers in which experts are chosen; one expert alone is no choice."""
        first = next(iter(self.counts.values()), [])
        return [index for index, layer in enumerate(first) if layer and len(layer) > 1]

    def choices(self, domain: str, layer: int) -> np.ndarray:
        """[E] the counts of one layer that has experts."""
        return np.array(self.counts[domain][layer], dtype=float)

    def shares(self, domain: str, layer: int) -> np.ndarray:
        """[E] the share of each expert in the choices of one layer; the shares sum to 1."""
        row = self.choices(domain, layer)
        return row / max(row.sum(), 1)


@dataclass(frozen=True, config=SCHEMA)
class Run:
    """One model on the held-out examples."""

    key: str
    """SHA-256 of the model, the examples and the settings of the measurement."""
    seed: int | None
    """None for a model that was not trained."""
    folder: str
    """Of the run, relative to that of the file that says so."""
    parameters: Parameters
    nll: list[Number]
    """Negative log-likelihood of the assistant's tokens of each example, summed, in nats."""
    answers: list[str]
    """To each of the study's questions."""
    experts: ExpertCounts | None
    """None for a dense model."""
    training: Training | None
    """None for a model that was not trained."""


@dataclass(frozen=True, config=SCHEMA)
class Arm:
    """A model tuned in one way."""

    name: str
    settings: dict[str, str]
    """The recipe, with dotted names; empty for a model that was not trained."""
    runs: Annotated[list[Run], Len(1)]
    """One for each seed."""

    @property
    def trained(self) -> bool:
        """Whether its runs were trained."""
        return self.runs[0].training is not None

    @property
    def parameters(self) -> Parameters:
        """The same in all its runs."""
        return self.runs[0].parameters

    def label(self, run: Run) -> str:
        """A run's name: the arm's, with the seed if there are several."""
        return self.name if len(self.runs) == 1 else f"{self.name}, seed {run.seed}"


@dataclass(frozen=True, config=SCHEMA)
class Example:
    """A held-out conversation."""

    domain: str
    tokens: Annotated[int, Ge(1)]
    """The assistant's tokens, by which the loss is divided."""


@dataclass(frozen=True, config=SCHEMA)
class Question:
    """A prompt that every model answers, to be read side by side."""

    domain: str
    prompt: str
    reference: str


@dataclass(frozen=True, config=SCHEMA)
class Source:
    """Where a domain's conversations come from."""

    domain: str
    source: str
    licence: str


@dataclass(frozen=True, config=SCHEMA)
class Results:
    """All that a study has measured so far, and the circumstances."""

    model: str
    """The dense model that every arm starts from."""
    arms: Annotated[list[Arm], Len(1)]
    """The last one is what the study is about: it is compared with each of the others."""
    examples: Annotated[list[Example], Len(1)]
    left_out: int
    """Held-out examples that are not scored, since truncation leaves nothing of the answer."""
    questions: list[Question]
    sources: list[Source]
    notes: list[str]
    machine: str

    def __post_init__(self) -> None:
        if faults := [*self._faults()]:
            raise ValueError("; ".join(faults))

    def _faults(self) -> Iterator[str]:
        if len({arm.name for arm in self.arms}) < len(self.arms):
            yield "arms must differ in name"
        for index, arm in enumerate(self.arms):
            if not self.seeds(arm, self.arms[-1]):
                yield f"arms[{index}].runs must share a seed with those of {self.arms[-1].name}"
            for number, run in enumerate(arm.runs):
                place = f"arms[{index}].runs[{number}]"
                for field, wanted in (("nll", self.examples), ("answers", self.questions)):
                    if (found := len(getattr(run, field))) != len(wanted):
                        yield f"{place}.{field} has {found} entries and must have {len(wanted)}"
                if run.experts and set(run.experts.counts) != set(self.domains):
                    yield f"{place}.experts.counts must have the domains {', '.join(self.domains)}"

    @property
    def subject(self) -> Arm:
        """What the study is about."""
        return self.arms[-1]

    @property
    def others(self) -> list[Arm]:
        """What it is compared with: trained arms first, as that training helps is seldom in doubt."""
        return sorted(self.arms[:-1], key=lambda arm: not arm.trained)

    @property
    def domains(self) -> list[str]:
        """In the order of the examples."""
        return list(dict.fromkeys(example.domain for example in self.examples))

    def runs(self) -> Iterator[tuple[Arm, Run]]:
        """Every run with its arm."""
        return ((arm, run) for arm in self.arms for run in arm.runs)

    def tokens(self, domain: str) -> np.ndarray:
        """[N] the assistant's tokens of a domain's examples."""
        return np.array([example.tokens for example in self.examples if example.domain == domain], dtype=float)

    def nll(self, run: Run, domain: str) -> np.ndarray:
        """[N] summed negative log-likelihood of a domain's examples in one run, in nats."""
        return np.array([nll for e, nll in zip(self.examples, run.nll, strict=True) if e.domain == domain])

    def losses(self, arm: Arm, domain: str) -> np.ndarray:
        """[S] mean loss of an assistant's token in each run of an arm, in nats."""
        return np.array([self.nll(run, domain).sum() for run in arm.runs]) / self.tokens(domain).sum()

    @staticmethod
    def seeds(first: Arm, second: Arm) -> list[int | None]:
        """The seeds with which two arms can be compared: those of both; None if neither was trained."""
        one, two = ({run.seed for run in arm.runs} for arm in (first, second))
        shared = one & two if first.trained == second.trained else (one | two) - {None}
        return sorted(shared, key=lambda seed: (seed is None, seed))

    def differences(self, other: Arm, domain: str) -> np.ndarray:
        """[S, N] loss of the subject less that of another arm, by seed and example, a mean over the example's tokens.

        A model that was not trained counts as the same in every seed.
        """
        seeds = self.seeds(self.subject, other)
        rows = [
            [next(r for r in arm.runs if r.seed in (seed, None)) for arm in (self.subject, other)] for seed in seeds
        ]
        with np.errstate(invalid="ignore"):
            return np.array([self.nll(a, domain) - self.nll(b, domain) for a, b in rows]) / self.tokens(domain)


@dataclass(frozen=True, config=LENIENT)
class Step:
    """A line of metrics.jsonl; what only crafted models have is NaN for the others."""

    loss: Number
    tokens: Number
    tokens_per_second: Number
    aux_loss: Number = math.nan
    load_entropy: Number = math.nan


@dataclass(frozen=True, config=LENIENT)
class Evaluation:
    """A line of metrics.jsonl on held-out data."""

    tokens: Number
    held_out: dict[str, Number]
    """The loss of each source, by name."""


Metrics = dict[str, np.ndarray]
"""The columns of metrics.jsonl, an entry for each logged step, by the names of `Step`'s fields."""


def read_results(folder: Path) -> Results:
    """The results in a study's folder.

    Raises:
        FileNotFoundError: the study has not written any.
        ValueError: in one line, naming the file and every place that breaks a rule.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RESULTS}: no run of a study has finished there")
    return parse(Results, path.read_bytes(), str(path))


def read_metrics(folder: Path) -> Metrics:
    """The training curves of a run; errors as of `read_results`."""
    steps = [line for line in _lines(folder) if isinstance(line, Step)]
    if not steps:
        raise ValueError(f"{folder / METRICS} must have a line for each logged step, and has none")
    return {field.name: np.array([getattr(step, field.name) for step in steps]) for field in fields(Step)}


def read_evaluations(folder: Path) -> list[Evaluation]:
    """What a run measured on held-out data while it trained; errors as of `read_results`."""
    return [line for line in _lines(folder) if isinstance(line, Evaluation)]


def _lines(folder: Path) -> Iterator[Step | Evaluation]:
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {METRICS}: it is no training run")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            name = f"{path}, line {number}"
            yield parse(Evaluation, line, name) if b'"held_out"' in line else parse(Step, line, name)


def parse(kind: type[T], text: bytes, name: str) -> T:
    """Build a dataclass of this module from JSON.

    Raises:
        ValueError: in one line, naming the file and every place that breaks a rule.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        faults = [_fault(fault) for fault in error.errors()]
        more = [f"and {len(faults) - 12} more"] if len(faults) > 12 else []
        raise ValueError(f"{name}: {'; '.join(faults[:12] + more)}") from None


def to_json(value: Any) -> str:
    """A dataclass of this module as JSON, with NaN and infinity spelt out."""
    return TypeAdapter(type(value)).dump_json(value, indent=1).decode() + "\n"


def _fault(fault: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    rule = {"missing": "is missing", "unexpected_keyword_argument": "is not a known field"}.get(fault["type"])
    message = fault["msg"].replace("Input should be", "must be").replace("Value error, ", ": " if place else "")
    return f"{place} {rule or message}".strip().replace(" : ", ": ")
