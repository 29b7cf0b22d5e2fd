"""The files a demo run leaves behind, read and checked before anything is drawn from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BASE, DENSE, PESC = "base", "dense + LoRA", "PESC"
PAIR = f"{PESC} - {DENSE}"
FILES = ("metrics.jsonl", "dense/metrics.jsonl", "results.json", "routing.json", "answers.json")
ANSWER_KEYS = ("domain", "prompt", "reference", "base", "dense", "pesc")
SETUP_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "seed": (int,),
    "steps": (int,),
    "tokens": (int,),
    "machine": (str,),
    "seconds": (dict,),
    "peak_memory_gb": (dict,),
}
Metrics = dict[str, np.ndarray]


@dataclass(frozen=True)
class Model:
    """One row of the results: held-out loss per domain, and what the model weighs."""

    name: str
    loss: dict[str, float]
    total: int
    active: int
    trained: int


@dataclass(frozen=True)
class Results:
    """The measured outcome of a run and the circumstances it was measured in."""

    domains: list[str]
    models: list[Model]
    held_out_tokens: dict[str, int]
    held_out_rows: dict[str, int]
    setup: dict[str, Any]
    sources: list[dict[str, str]]
    notes: list[str]
    differences: dict[str, dict[str, tuple[float, float]]]

    def model(self, name: str) -> Model:
        """The model of that name; reading has made sure that the three of the comparison exist."""
        return next(model for model in self.models if model.name == name)


@dataclass(frozen=True)
class Routing:
    """Per domain and layer, the share of (token, choice) pairs of each expert; None without experts."""

    num_experts_per_tok: list[int]
    shares: dict[str, list[np.ndarray | None]]

    @property
    def num_layers(self) -> int:
        """Layers of the model, those without experts included."""
        return len(next(iter(self.shares.values())))

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers that have experts."""
        rows = next(iter(self.shares.values()))
        return [layer for layer, row in enumerate(rows) if row is not None]


@dataclass(frozen=True)
class Run:
    """Everything the report is made from."""

    pesc: Metrics
    dense: Metrics
    results: Results
    routing: Routing
    answers: list[dict[str, str]]


class Faults:
    """Collects what is wrong with one file, so that a single error can name all of it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[str] = []

    def add(self, fault: str) -> None:
        """Note one fault."""
        self.found.append(fault)

    def take(self, mapping: Any, key: str, kinds: tuple[type, ...], where: str) -> Any:
        """`mapping[key]` if it is there and of a wanted kind; otherwise a fault, and an empty value."""
        spot = f"{where}.{key}" if where else key
        if not isinstance(mapping, Mapping) or key not in mapping:
            self.add(f"{spot} is missing")
        elif not isinstance(mapping[key], kinds) or isinstance(mapping[key], bool):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            self.add(f"{spot} must be {wanted}, not {type(mapping[key]).__name__}")
        else:
            return mapping[key]
        return kinds[0]()

    def number(self, mapping: Any, key: str, where: str) -> float:
        """A float; null means "not finite", which some writers of JSON cannot spell otherwise."""
        if isinstance(mapping, Mapping) and key in mapping and mapping[key] is None:
            return math.nan
        return float(self.take(mapping, key, (float, int), where))

    def raise_any(self) -> None:
        """One ValueError for all faults, if there are any."""
        if self.found:
            shown = self.found[:12] + ([f"and {len(self.found) - 12} more"] if len(self.found) > 12 else [])
            raise ValueError(f"{self.file}: " + "; ".join(shown))


def read_run(run: Path) -> Run:
    """Read and check the files of a finished run; an error names the file and what is wrong in it."""
    missing = [name for name in FILES if not (run / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{run} is not a finished run: {', '.join(missing)} missing")
    results = _results(_json(run, "results.json"))
    return Run(
        pesc=_metrics(run, "metrics.jsonl", ("loss", "tokens", "tokens_per_second", "aux_loss", "balance")),
        dense=_metrics(run, "dense/metrics.jsonl", ("loss", "tokens", "tokens_per_second")),
        results=results,
        routing=_routing(_json(run, "routing.json"), results.domains),
        answers=_answers(_json(run, "answers.json")),
    )


def _json(run: Path, name: str) -> Any:
    try:
        return json.loads((run / name).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from error


def _metrics(run: Path, name: str, keys: tuple[str, ...]) -> Metrics:
    faults = Faults(name)
    rows: list[list[float]] = []
    for number, line in enumerate((run / name).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            faults.add(f"line {number} is not valid JSON")
            continue
        rows.append([faults.number(entry, key, f"line {number}") for key in keys])
    if not rows:
        faults.add("no logging step in it")
    faults.raise_any()
    return {key: np.array(column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}


def _results(data: Any) -> Results:
    faults = Faults("results.json")
    domains = [str(domain) for domain in faults.take(data, "domains", (list,), "")]
    if not domains:
        faults.add("domains names no domain")
    setup = faults.take(data, "setup", (dict,), "")
    for key, kinds in SETUP_KINDS.items():
        value = faults.take(setup, key, kinds, "setup")
        if kinds == (dict,):
            for run in ("dense", "pesc"):
                faults.number(value, run, f"setup.{key}")
    tokens, rows = (faults.take(data, key, (dict,), "") for key in ("held_out_tokens", "held_out_rows"))
    origin = faults.take(data, "data", (dict,), "")
    sources = faults.take(origin, "sources", (list,), "data")
    result = Results(
        domains=domains,
        models=_models(faults, faults.take(data, "models", (list,), ""), domains),
        held_out_tokens={d: faults.take(tokens, d, (int,), "held_out_tokens") for d in domains},
        held_out_rows={d: faults.take(rows, d, (int,), "held_out_rows") for d in domains},
        setup=setup,
        sources=[
            {key: faults.take(source, key, (str,), f"data.sources[{index}]") for key in ("domain", "source", "licence")}
            for index, source in enumerate(sources)
        ],
        notes=[str(note) for note in faults.take(origin, "notes", (list,), "data")],
        differences=_differences(faults, faults.take(data, "uncertainty", (dict,), ""), domains),
    )
    faults.raise_any()
    return result


def _models(faults: Faults, entries: list[Any], domains: list[str]) -> list[Model]:
    models = []
    for index, entry in enumerate(entries):
        name = faults.take(entry, "name", (str,), f"models[{index}]")
        where = f"models[{name or index}]"
        loss = faults.take(entry, "loss", (dict,), where)
        sizes = faults.take(entry, "parameters", (dict,), where)
        models.append(
            Model(
                name=name,
                loss={domain: faults.number(loss, domain, f"{where}.loss") for domain in domains},
                **{
                    key: faults.take(sizes, key, (int,), f"{where}.parameters")
                    for key in ("total", "active", "trained")
                },
            )
        )
    absent = [name for name in (BASE, DENSE, PESC) if name not in {model.name for model in models}]
    if absent:
        faults.add(f"models has no entry named {', '.join(absent)}")
    return models


def _differences(
    faults: Faults, pairs: dict[str, Any], domains: list[str]
) -> dict[str, dict[str, tuple[float, float]]]:
    if PAIR not in pairs:
        faults.add(f"uncertainty has no entry {PAIR!r}")
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for pair, entry in pairs.items():
        found[pair] = {}
        for domain in domains:
            where = f"uncertainty[{pair}]"
            value = faults.take(entry, domain, (list,), where)
            if len(value) != 2:
                faults.add(f"{where}.{domain} must be [mean difference, standard error]")
                continue
            named = dict(zip(("mean", "error"), value, strict=True))
            found[pair][domain] = (
                faults.number(named, "mean", f"{where}.{domain}"),
                faults.number(named, "error", f"{where}.{domain}"),
            )
    return found


def _routing(data: Any, domains: list[str]) -> Routing:
    faults = Faults("routing.json")
    experts = faults.take(data, "num_experts", (int, list), "")
    chosen = faults.take(data, "num_experts_per_tok", (int, list), "")
    shares = faults.take(data, "shares", (dict,), "")
    layers = {domain: faults.take(shares, domain, (list,), "shares") for domain in domains}
    faults.raise_any()
    depth = len(layers[domains[0]])
    for key, value in (("num_experts", experts), ("num_experts_per_tok", chosen)):
        if isinstance(value, list) and len(value) != depth:
            faults.add(f"{key} lists {len(value)} layers, shares.{domains[0]} has {depth}")
    for domain in domains:
        if len(layers[domain]) != depth:
            faults.add(f"shares.{domain} has {len(layers[domain])} layers, shares.{domains[0]} has {depth}")
    if all(row is None for row in layers[domains[0]]):
        faults.add("no layer has experts")
    faults.raise_any()
    sizes = experts if isinstance(experts, list) else [experts] * depth
    rows = {
        domain: [
            _shares(faults, row, size, f"shares.{domain}[{layer}]")
            for layer, (row, size) in enumerate(zip(layers[domain], sizes, strict=True))
        ]
        for domain in domains
    }
    for layer in range(depth):
        if len({rows[domain][layer] is None for domain in domains}) > 1:
            faults.add(f"layer {layer} has experts in some domains and none in others")
    faults.raise_any()
    return Routing(chosen if isinstance(chosen, list) else [chosen] * depth, rows)


def _shares(faults: Faults, row: Any, size: Any, where: str) -> np.ndarray | None:
    if row is None:
        return None
    numeric = isinstance(row, list) and all(type(share) in (int, float) for share in row)
    if not numeric or len(row) != size:
        faults.add(f"{where} must be {size} numbers")
    elif not abs(sum(row) - 1) < 0.01:
        faults.add(f"{where} sums to {sum(row):.4g}, not 1")
    else:
        return np.array(row, dtype=float)
    return None


def _answers(data: Any) -> list[dict[str, str]]:
    faults = Faults("answers.json")
    if not isinstance(data, list):
        faults.add(f"must be a list of answers, not {type(data).__name__}")
        data = []
    answers = [
        {key: faults.take(answer, key, (str,), f"[{index}]") for key in ANSWER_KEYS}
        for index, answer in enumerate(data)
    ]
    faults.raise_any()
    return answers
