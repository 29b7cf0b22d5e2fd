"""What a study measured: the schema that its writer fills and every reader parses.

A study trains some arms (a model tuned in one way) with some seeds and scores every run on the same held-out examples.
Nothing derived is stored: means, differences and intervals are computed from the runs (`pesc.report.findings`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

RESULTS, METRICS = "results.json", "metrics.jsonl"
SCHEMA = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")
LENIENT = ConfigDict(extra="ignore")
"""For files whose writer has more to say than we read."""

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
        depth = len(self.num_experts_per_tok)
        widths: list[int | None] | None = None
        for domain, layers in self.counts.items():
            if len(layers) != depth:
                raise ValueError(f"counts.{domain} has {len(layers)} layers, num_experts_per_tok has {depth}")
            found = [None if layer is None else len(layer) for layer in layers]
            widths = widths or found
            for index, (width, first, chosen) in enumerate(zip(found, widths, self.num_experts_per_tok, strict=True)):
                if width != first or (width is None) != (chosen is None):
                    raise ValueError(f"counts.{domain}[{index}] has {width} experts, other lists {first}")
            if not any(sum(layer) > 0 for layer in layers if layer is not None):
                raise ValueError(f"counts.{domain} counts no token")

    @property
    def layers(self) -> list[int]:
        """Indices of the decoder layers in which experts are chosen; one expert alone is no choice."""
        first = next(iter(self.counts.values()), [])
        return [index for index, layer in enumerate(first) if layer is not None and len(layer) > 1]

    def choices(self, domain: str, layer: int) -> np.ndarray:
        """[E] the counts of one layer that has experts."""
        row = self.counts[domain][layer]
        assert row is not None
        return np.array(row, dtype=float)

    def shares(self, domain: str, layer: int) -> np.ndarray:
        """[E] the share of each expert in the choices of one layer; the shares sum to 1."""
        row = self.choices(domain, layer)
        return row / max(row.sum(), 1)


@dataclass(frozen=True, config=SCHEMA)
class Measured:
    """One model on the held-out examples."""

    key: str
    """SHA-256 of the model, the examples and the settings of the measurement."""
    parameters: Parameters
    nll: list[Number]
    """Negative log-likelihood of the assistant's tokens of each example, summed, in nats."""
    answers: list[str]
    """To each of the study's questions."""
    routing: ExpertCounts | None
    """None for a dense model."""
    training: Training | None
    """None for a model that was not trained."""


@dataclass(frozen=True, config=SCHEMA)
class Run:
    """One arm trained with one seed."""

    arm: str
    seed: int | None
    """None for a model that was not trained."""
    folder: str
    """The run's folder, relative to that of the results."""
    measured: Measured


@dataclass(frozen=True, config=SCHEMA)
class Arm:
    """A model tuned in one way."""

    name: str
    settings: dict[str, str]
    """The recipe, with dotted names; empty for a model that was not trained."""


@dataclass(frozen=True, config=SCHEMA)
class Example:
    """A held-out conversation."""

    domain: str
    tokens: int
    """The assistant's tokens, by which the loss is divided."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens ({self.tokens}) must be at least 1")


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
    arms: list[Arm]
    comparisons: list[tuple[str, str]]
    """Pairs of arms; a difference is the first one's loss less the second one's. The first pair makes the headline."""
    runs: list[Run]
    examples: list[Example]
    left_out: int
    """Held-out examples that are not scored, since truncation leaves nothing of the answer."""
    questions: list[Question]
    sources: list[Source]
    notes: list[str]
    machine: str

    def __post_init__(self) -> None:
        faults = [*self._run_faults(), *self._pair_faults()]
        if not self.examples:
            faults.append("examples must not be empty")
        if faults:
            raise ValueError("; ".join(faults))

    def _run_faults(self) -> Iterable[str]:
        for index, run in enumerate(self.runs):
            place, routing = f"runs[{index}]", run.measured.routing
            if run.arm not in self.names:
                yield f"{place}.arm ({run.arm}) must be the name of an arm"
            for field, wanted in (("nll", self.examples), ("answers", self.questions)):
                if (found := len(getattr(run.measured, field))) != len(wanted):
                    yield f"{place}.measured.{field} has {found} entries and must have {len(wanted)}"
            if routing and set(routing.counts) != set(self.domains):
                yield f"{place}.measured.routing.counts must have the domains {', '.join(self.domains)}"

    def _pair_faults(self) -> Iterable[str]:
        if len(set(self.names)) < len(self.names):
            yield "arms must differ in name"
        yield from (f"arms: {name} has no run" for name in self.names if not self.of(name))
        for index, pair in enumerate(self.comparisons):
            unknown = [name for name in pair if name not in self.names]
            if unknown:
                yield f"comparisons[{index}] must name arms, and {', '.join(unknown)} is none"
            elif not self.seeds(*pair) and all(run.seed is not None for name in pair for run in self.of(name)):
                yield f"comparisons[{index}]: {' and '.join(pair)} share no seed"

    @property
    def names(self) -> list[str]:
        """Names of the arms, in order."""
        return [arm.name for arm in self.arms]

    @property
    def domains(self) -> list[str]:
        """In the order of the examples."""
        return list(dict.fromkeys(example.domain for example in self.examples))

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm, one for each seed."""
        return [run for run in self.runs if run.arm == arm]

    def tokens(self, domain: str) -> np.ndarray:
        """[N] the assistant's tokens of a domain's examples."""
        return np.array([example.tokens for example in self.examples if example.domain == domain], dtype=float)

    def nll(self, run: Run, domain: str) -> np.ndarray:
        """[N] summed negative log-likelihood of a domain's examples in one run, in nats."""
        pairs = zip(self.examples, run.measured.nll, strict=True)
        return np.array([nll for example, nll in pairs if example.domain == domain])

    def losses(self, arm: str, domain: str) -> np.ndarray:
        """[S] mean loss of an assistant's token in each run of an arm, in nats."""
        return np.array([self.nll(run, domain).sum() for run in self.of(arm)]) / self.tokens(domain).sum()

    def seeds(self, *arms: str) -> list[int]:
        """The seeds that every trained arm of these has runs of."""
        found = [{run.seed for run in self.of(arm) if run.seed is not None} for arm in arms]
        trained = [seeds for seeds in found if seeds]
        return sorted(set.intersection(*trained)) if trained else []

    def differences(self, first: str, second: str, domain: str) -> np.ndarray:
        """[S, N] loss of `first` less that of `second`, by seed and example, each a mean over the example's tokens.

        A model that was not trained counts as the same in every seed.
        """
        seeds: list[int | None] = [*self.seeds(first, second)]
        rows = [[self._at(arm, seed) for arm in (first, second)] for seed in seeds or [None]]
        with np.errstate(invalid="ignore"):
            return np.array([self.nll(a, domain) - self.nll(b, domain) for a, b in rows]) / self.tokens(domain)

    def _at(self, arm: str, seed: int | None) -> Run:
        return next(run for run in self.of(arm) if run.seed in (seed, None))


@dataclass(frozen=True, config=LENIENT)
class Step:
    """A line of metrics.jsonl; what only crafted models have is NaN for the others."""

    loss: Number
    tokens: Number
    tokens_per_second: Number
    aux_loss: Number = math.nan
    load_entropy: Number = math.nan


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
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {METRICS}: it is no training run")
    lines = path.read_bytes().splitlines()
    steps = [parse(Step, line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not steps:
        raise ValueError(f"{path} must have a line for each logged step, and has none")
    return {field.name: np.array([getattr(step, field.name) for step in steps]) for field in fields(Step)}


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
