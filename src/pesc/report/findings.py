"""What the numbers of a study say, in words. Pure functions: no files, no drawing, no HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pesc.report.results import Arm, Metrics, Results, Run
from pesc.report.statistics import Estimate, estimate

ONE_SEED = (
    "One seed gives no verdict on the method: in the demo, another seed moved such differences by more than this error"
    " (docs/results.md)."
)
Curves = Sequence[tuple[Arm, Run, Metrics]]


@dataclass(frozen=True)
class Comparison:
    """Two arms on one domain; a negative mean favours the first."""

    first: str
    second: str
    domain: str
    estimate: Estimate
    losses: tuple[float, float]
    """Mean over the seeds of the loss of an assistant's token, of the first arm and of the second."""

    @property
    def sentence(self) -> str:
        """What the difference says, and no more."""
        case, (first, second) = self.estimate, self.losses
        text = {
            "better": f"the loss of {self.first} is lower by {number(-case.mean)}",
            "worse": f"the loss of {self.first} is higher by {number(case.mean)}",
            "unclear": f"no clear difference, the loss of {self.first} differs by {signed(case.mean)}",
            "unmeasured": "no number, since a loss is not finite",
        }[case.outcome]
        if case.num_seeds == 1:
            where, sure = "In this run", f"standard error over examples {number(case.error)}"
        else:
            where = f"Over {case.num_seeds} seeds"
            sure = f"95 % interval {signed(case.low)} to {signed(case.high)}, between seeds {number(case.spread)}"
        text = f"{where}: {text} ({sure}; {number(first)} against {number(second)})."
        if case.outcome in ("better", "worse") and (first - second) * case.mean < 0:
            text += " Example by example and over all tokens at once the two point opposite ways; trust neither."
        return text


def compare(results: Results, other: Arm) -> list[Comparison]:
    """The study's subject against another arm, domain by domain."""
    found = []
    for domain in results.domains:
        first, second = (float(results.losses(arm, domain).mean()) for arm in (results.subject, other))
        difference = estimate(results.differences(other, domain))
        found.append(Comparison(results.subject.name, other.name, domain, difference, (first, second)))
    return found


def verdict(comparisons: Sequence[Comparison]) -> str:
    """What a pair of arms says over all domains, in one sentence; none from a single seed."""
    first, second, seeds = comparisons[0].first, comparisons[0].second, comparisons[0].estimate.num_seeds
    words = {
        "better": "better on {}" if seeds > 1 else "lower on {}",
        "worse": "worse on {}" if seeds > 1 else "higher on {}",
        "unclear": "not clearly different on {}",
        "unmeasured": "without a finite number on {}",
    }
    groups = {outcome: [c.domain for c in comparisons if c.estimate.outcome == outcome] for outcome in words}
    parts = [words[outcome].format(listed(names)) for outcome, names in groups.items() if names]
    if seeds == 1:
        return f"No verdict from one seed: beside {second}, the loss of {first} in this run is {listed(parts)}."
    if len(parts) > 1:
        kind = "A mixed result" if groups["better"] and groups["worse"] else "A partial result"
        return f"{kind} over {seeds} seeds: {first} is {listed(parts)}, against {second}."
    count = len(comparisons)
    everywhere = f"in all {count} domains" if count > 1 else f"on {comparisons[0].domain}"
    whole = {
        "better": f"{first} beats {second} {everywhere}",
        "worse": f"{first} is behind {second} {everywhere}",
        "unclear": f"No clear difference between {first} and {second} {everywhere}",
        "unmeasured": f"No verdict: a held-out loss is not a finite number {everywhere}",
    }[comparisons[0].estimate.outcome]
    return f"{whole}, over {seeds} seeds."


def headline(results: Results) -> str:
    """The study in one sentence."""
    if results.others:
        return verdict(compare(results, results.others[0]))
    return f"Held-out loss of {results.subject.name}: nothing is compared."


def lead(results: Results) -> list[str]:
    """Whether training helped at all, and what the subject costs beside the arm of the headline."""
    base = next((arm for arm in results.arms if not arm.trained), None)
    found = []
    if base and results.subject.trained:
        helped = {
            arm.name: [d for d in results.domains if results.losses(arm, d).mean() < results.losses(base, d).mean()]
            for arm in results.arms
            if arm.trained
        }
        parts = [
            f"{name} lowers the held-out loss on {listed(domains) or 'no domain'}" for name, domains in helped.items()
        ]
        if all(domains == results.domains for domains in helped.values()):
            parts = [f"training lowers the held-out loss of {listed(list(helped))} on every domain"]
        found.append(f"Against {base.name}, {listed(parts)}.")
    if results.others and results.others[0].trained:
        found.append(_cost(results.subject, results.others[0]))
    return found


def _cost(first: Arm, second: Arm) -> str:
    one, other = first.parameters.trained, second.parameters.trained
    (seconds, memory), (other_seconds, other_memory) = (
        np.mean([(run.training.seconds, run.training.peak_memory_gb) for run in arm.runs if run.training], axis=0)
        for arm in (first, second)
    )
    return (
        f"{first.name} trains {count(one)} parameters, {one / max(other, 1):.1f} times the {count(other)} of"
        f" {second.name}, and took {number(seconds, 0)} s against {number(other_seconds, 0)} s, with"
        f" {number(memory, 1)} GB at its peak against {number(other_memory, 1)} GB."
    )


def curve_notes(curves: Curves) -> str:
    """Where the training curves ended, how fast they were, and whether anything in them was not a number."""
    ends: dict[str, list[tuple[float, float]]] = {}
    bad = ""
    for arm, run, metrics in curves:
        speed = float(np.median(_finite(metrics["tokens_per_second"])))
        ends.setdefault(arm.name, []).append((tail(metrics["loss"]), speed))
        if missing := int((~np.isfinite(metrics["loss"])).sum()):
            bad += f" Of the {len(metrics['loss'])} logged losses of {arm.label(run)}, {missing} are not finite."
    parts = []
    for name, pairs in ends.items():
        loss, speed = np.mean(pairs, axis=0)
        parts.append(f"{name} {number(loss)} at {number(speed, 0)} tokens a second")
    return f"Mean loss over the last tenth of the logged steps: {listed(parts)}.{bad}"


def caveats(results: Results) -> list[str]:
    """What keeps the verdict from being more than it is, the weightiest first."""
    found = []
    for other in results.others[:1]:
        one, two = results.subject.parameters.trained, other.parameters.trained
        if two and one > 1.1 * two:
            found.append(
                f"Not a control of equal size: {results.subject.name} trains {count(one - two)} more parameters than"
                f" {other.name}, so a lower loss may come from more weights and not from their being sparse."
            )
        found.append(_seed_caveat(results.seeds(results.subject, other)))
    total = results.subject.parameters.total
    if total < 1_000_000_000:
        found.append(
            f"A small model ({count(total)} parameters): this tests the workings of the method, not its worth at scale."
        )
    found.append(_held_out_caveat(results))
    if comparisons := len(results.others) * len(results.domains):
        found.append(
            "A difference counts as clear if its 95 % interval leaves out zero. By chance alone, one comparison in"
            f" twenty does; here there {'are' if comparisons > 1 else 'is'} {comparisons}."
        )
    for steps, tokens in sorted(
        {(run.training.steps, run.training.tokens) for _, run in results.runs() if run.training}
    ):
        found.append(f"Training saw {tokens:,} tokens in {steps:,} steps. Another budget may give another result.")
    found.append(
        "The loss on reference answers was measured, not a score on a task. The answers shown are examples, too few to"
        " count from."
    )
    return found


def _seed_caveat(seeds: Sequence[int | None]) -> str:
    if len(seeds) < 2:
        return f"One run of each model (seed {seeds[0]}). {ONE_SEED}"
    return (
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}) decide the initial values and the order of the data. The"
        " training data and the held-out examples are the same for all of them; other data may move any difference."
    )


def _held_out_caveat(results: Results) -> str:
    sizes = {domain: results.tokens(domain) for domain in results.domains}
    held = listed([f"{len(n):,} examples ({n.sum():,.0f} tokens) of {domain}" for domain, n in sizes.items()])
    text = f"Held out: {held}."
    if results.left_out:
        text += f" {results.left_out} more are left out, since truncation leaves nothing of their answers."
    if min(len(n) for n in sizes.values()) < 30:
        text += " With so few examples the standard error is itself rough."
    return text


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def number(value: float, digits: int = 3) -> str:
    """A float for people; what is not finite says so instead of reading `nan`."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def signed(value: float, digits: int = 3) -> str:
    """As `number`, with a sign, and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "\u2212") if math.isfinite(value) else "not finite"


def over_seeds(values: np.ndarray) -> str:
    """The mean over seeds, with the standard deviation if there are several."""
    spread = f" \u00b1 {number(float(values.std(ddof=1)))}" if len(values) > 1 else ""
    return number(float(values.mean())) + spread


def count(value: float) -> str:
    """A parameter count with a unit."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def tail(values: np.ndarray) -> float:
    """Mean of the finite values in the last tenth of a curve: where it ended, without the jitter."""
    return float(np.mean(_finite(values[-max(1, len(values) // 10) :])))


def _finite(values: np.ndarray) -> np.ndarray:
    kept = values[np.isfinite(values)]
    return kept if len(kept) else np.array([math.nan])
