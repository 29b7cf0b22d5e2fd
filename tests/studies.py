"""Synthetic studies with the outcome that a test chooses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pesc.report.results import (
    Arm,
    Example,
    ExpertCounts,
    Parameters,
    Question,
    Results,
    Run,
    Source,
    Training,
    to_json,
)

DOMAINS = ["chat", "code", "math"]
DENSE, PESC, BASE = "dense + LoRA", "PESC", "base"
BASE_LOSS = {"chat": 2.113, "code": 1.421, "math": 1.207}
SIZES = {
    BASE: Parameters(134_515_008, 134_515_008, 0),
    DENSE: Parameters(134_515_008, 134_515_008, 4_884_480),
    PESC: Parameters(152_350_848, 139_107_648, 22_720_320),
}


def make_results(
    means: dict[str, float] | None = None,
    *,
    spread: float = 0.01,
    seed_shifts: tuple[float, ...] = (0.0,),
    num_examples: int = 24,
    layers: int = 4,
    experts: int = 8,
) -> Results:
    """A base, the same with LoRA, and PESC.

    Args:
        means: by domain, PESC's loss less that of dense + LoRA.
        spread: standard deviation of that difference over the examples.
        seed_shifts: what each seed adds to it.
        num_examples: of each domain.
        layers: of the model.
        experts: of each layer.
    """
    means = dict(zip(DOMAINS, (-0.031, -0.044, -0.052), strict=True)) if means is None else means
    examples = [Example(domain, 10 + index) for domain in means for index in range(num_examples)]

    def run(name: str, seed: int | None, shift: float = 0.0) -> Run:
        change = {BASE: 0.0, DENSE: -0.25, PESC: -0.25 + shift}[name]
        nll = []
        for index, example in enumerate(examples):
            loss = BASE_LOSS.get(example.domain, 1.5) + change
            if name == PESC:
                loss += means[example.domain] + spread * (-1) ** index
            nll.append(float(example.tokens * loss))
        return Run(
            key="key",
            seed=seed,
            folder=f"{name}-{seed}",
            parameters=SIZES[name],
            nll=nll,
            answers=[f"42, on {domain}" for domain in means],
            experts=make_counts(list(means), layers, experts) if name == PESC else None,
            training=None if name == BASE else Training(30, 15360, 250.1 if name == DENSE else 270.3, 2.0),
        )

    return Results(
        model="smollm2-135m-instruct",
        arms=[
            Arm(BASE, {}, [run(BASE, None)]),
            Arm(DENSE, {"lora.r": "16"}, [run(DENSE, seed) for seed, _ in enumerate(seed_shifts)]),
            Arm(
                PESC,
                {"pesc.num_experts": str(experts), "lora.r": "16"},
                [run(PESC, seed, shift) for seed, shift in enumerate(seed_shifts)],
            ),
        ],
        examples=examples,
        left_out=0,
        questions=[Question(domain, f"A question about {domain}?", "Forty-two.") for domain in means],
        sources=[Source(domain, f"examples about {domain}", "Apache-2.0") for domain in means],
        notes=["Examples longer than 512 tokens were left out."],
        machine="2 cores, x86_64, no accelerator",
    )


def make_counts(domains: list[str], layers: int, experts: int) -> ExpertCounts:
    """Counts of domains that route a little differently, more so in later layers."""
    rng = np.random.default_rng(3)
    common = 0.3 * rng.standard_normal((layers, experts))
    counts: dict[str, list[list[int] | None]] = {}
    for domain in domains:
        logits = common + np.linspace(0.05, 0.35, layers)[:, None] * rng.standard_normal((layers, experts))
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        counts[domain] = [[int(count) for count in row] for row in (6000 * shares).round()]
    return ExpertCounts([2] * layers, counts)


def write_study(folder: Path, results: Results, steps: int = 30) -> Path:
    """A study's folder with its results and the training curves of its runs."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(to_json(results))
    for index, (_, run) in enumerate(results.runs()):
        if run.training:
            (folder / run.folder).mkdir(exist_ok=True)
            lines = _metrics(steps, index, run.experts)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / run.folder / "metrics.jsonl").write_text(text)
    return folder


def _metrics(steps: int, seed: int, experts: ExpertCounts | None) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        drift = 1 - math.exp(-step / 30)
        line: dict[str, Any] = {
            "step": step,
            "loss": 1.15 + math.exp(-step / 18) + 0.08 * rng.standard_normal(),
            "learning_rate": 2e-4,
            "tokens": 512 * step,
            "tokens_per_second": 190 + 5 * rng.standard_normal(),
        }
        if experts:
            line["aux_loss"] = 2 * len(experts.layers) * (1.08 - 0.06 * drift + 0.004 * rng.standard_normal())
            line["load_entropy"] = 0.955 + 0.03 * drift + 0.002 * rng.standard_normal()
        lines.append(line)
        if step % 10 == 0:
            losses = {name: 1.4 + shift + math.exp(-step / 20) for name, shift in (("chat", 0.2), ("code", 0.0))}
            lines.append({"step": step, "tokens": 512 * step, "held_out": losses})
    return lines
