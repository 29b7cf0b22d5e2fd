"""What the numbers of a study say, in words. Pure functions: no files, no drawing, no HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pesc.report.results import Metrics, Results, Run
from pesc.report.statistics import Estimate, estimate

ONE_SEED = (
    "One seed gives no verdict on the method: in the demo, another seed moved such differences by more than this error"
    " (docs/results.md)."
)


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
    def outcome(self) -> str:
        """See `Estimate.outcome`."""
        return self.estimate.outcome

    @property
    def sentence(self) -> str:
        """What the difference says, and no more."""
        case, (first, second) = self.estimate, self.losses
        text = {
            "better": f"the loss of {self.first} is lower by {number(-case.mean)}",
            "worse": f"the loss of {self.first} is higher by {number(case.mean)}",
            "unclear": f"no clear difference, the loss of {self.first} differs by {signed(case.mean)}",
            "unmeasured": "no number, since a loss is not finite",
        }[self.outcome]
        if case.num_seeds == 1:
            where, sure = "In this run", f"standard error over examples {number(case.error)}"
        else:
            where = f"Over {case.num_seeds} seeds"
            sure = f"95 % interval {signed(case.low)} to {signed(case.high)}, between seeds {number(case.spread)}"
        text = f"{where}: {text} ({sure}; {number(first)} against {number(second)})."
        if self.outcome in ("better", "worse") and (first - second) * case.mean < 0:
            text += " Example by example and over all tokens at once the two point opposite ways; trust neither."
        return text


def compare(results: Results, first: str, second: str) -> list[Comparison]:
    """Two arms, domain by domain."""
    return [
        Comparison(
            first,
            second,
            domain,
            estimate(results.differences(first, second, domain)),
            (float(results.losses(first, domain).mean()), float(results.losses(second, domain).mean())),
        )
        for domain in results.domains
    ]


def verdict(comparisons: Sequence[Comparison]) -> str:
    """What a pair of arms says over all domains, in one sentence; none from a single seed."""
    first, second, seeds = comparisons[0].first, comparisons[0].second, comparisons[0].estimate.num_seeds
    words = {
        "better": "better on {}" if seeds > 1 else "lower on {}",
        "worse": "worse on {}" if seeds > 1 else "higher on {}",
        "unclear": "not clearly different on {}",
        "unmeasured": "without a finite number on {}",
    }
    groups = {outcome: [c.domain for c in comparisons if c.outcome == outcome] for outcome in words}
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
    }[comparisons[0].outcome]
    return f"{whole}, over {seeds} seeds."


def headline(results: Results) -> str:
    """The study in one sentence."""
    if results.comparisons:
        return verdict(compare(results, *results.comparisons[0]))
    return f"Held-out loss of {listed(results.names)}: nothing is compared."


def against_base(results: Results) -> str | None:
    """Whether training helped at all, before asking which kind helped more; None without an untrained arm."""
    base = next((arm for arm in results.names if _untrained(results, arm)), None)
    tuned = [arm for arm in results.names if not _untrained(results, arm)]
    if base is None or not tuned:
        return None
    worse = {
        arm: [d for d in results.domains if not results.losses(arm, d).mean() < results.losses(base, d).mean()]
        for arm in tuned
    }
    if not any(worse.values()):
        subject = f"{listed(tuned)} lower" if len(tuned) > 1 else f"{tuned[0]} lowers"
        return f"Against {base}, which is not trained, {subject} the held-out loss on every domain."
    parts = [f"{arm} does not lower the held-out loss on {listed(names)}" for arm, names in worse.items() if names]
    return f"Against {base}, which is not trained, {listed(parts)}; everywhere else training lowers it."


def cost(results: Results) -> str | None:
    """What the first arm of the headline's pair costs beside the second; None without such a pair."""
    if not results.comparisons:
        return None
    first, second = results.comparisons[0]
    one, other = (results.of(arm)[0].measured.parameters.trained for arm in (first, second))
    text = f"{first} trains {count(one)} parameters"
    if other:
        text += f", {one / other:.1f} times the {count(other)} of {second}"
    if _untrained(results, first) or _untrained(results, second):
        return text + "."
    seconds = [_mean_training(results, arm, "seconds") for arm in (first, second)]
    memory = [_mean_training(results, arm, "peak_memory_gb") for arm in (first, second)]
    return text + (
        f", and took {number(seconds[0], 0)} s against {number(seconds[1], 0)} s, with {number(memory[0], 1)} GB at its"
        f" peak against {number(memory[1], 1)} GB."
    )


def curve_notes(results: Results, metrics: Sequence[tuple[Run, Metrics]]) -> str:
    """Where the training curves ended, how fast they were, and whether anything in them was not a number."""
    ends = []
    for arm in results.names:
        mine = [columns for run, columns in metrics if run.arm == arm]
        if mine:
            speed = np.mean([_median(columns["tokens_per_second"]) for columns in mine])
            loss = np.mean([tail(columns["loss"]) for columns in mine])
            ends.append(f"{arm} {number(float(loss))} at {number(float(speed), 0)} tokens a second")
    text = f"Mean loss over the last tenth of the logged steps: {listed(ends)}." if ends else "Nothing was trained."
    for run, columns in metrics:
        bad = int((~np.isfinite(columns["loss"])).sum())
        if bad:
            text += f" Of the {len(columns['loss'])} logged losses of {label(results, run)}, {bad} are not finite."
    return text


def caveats(results: Results) -> list[str]:
    """What keeps the verdict from being more than it is, the weightiest first."""
    found = []
    for first, second in results.comparisons[:1]:
        one, other = (results.of(arm)[0].measured.parameters.trained for arm in (first, second))
        if other and one > 1.1 * other:
            found.append(
                f"Not a control of equal size: {first} trains {count(one - other)} more parameters than {second}, so a"
                " lower loss may come from more weights and not from their being sparse."
            )
        found.append(_seed_caveat(results.seeds(first, second)))
    total = results.runs[0].measured.parameters.total
    if total < 1_000_000_000:
        found.append(
            f"A small model ({count(total)} parameters): this tests the workings of the method, not its worth at scale."
        )
    found.append(_held_out_caveat(results))
    if results.comparisons:
        number_of = len(results.comparisons) * len(results.domains)
        found.append(
            "A difference counts as clear if its 95 % interval leaves out zero. By chance alone, one comparison in"
            f" twenty does; here there {'are' if number_of > 1 else 'is'} {number_of}."
        )
    steps = {
        (run.measured.training.steps, run.measured.training.tokens) for run in results.runs if run.measured.training
    }
    for step, tokens in sorted(steps):
        found.append(f"Training saw {tokens:,} tokens in {step:,} steps. Another budget may give another result.")
    found.append(
        "The loss on reference answers was measured, not a score on a task. The answers shown are examples, too few to"
        " count from."
    )
    return found


def _seed_caveat(seeds: list[int]) -> str:
    if len(seeds) < 2:
        return f"One run of each model (seed {', '.join(map(str, seeds)) or 'none'}). {ONE_SEED}"
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


def label(results: Results, run: Run) -> str:
    """A run's name: its arm's, with the seed where the arm has several."""
    return run.arm if len(results.of(run.arm)) == 1 else f"{run.arm}, seed {run.seed}"


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
    last = values[-max(1, len(values) // 10) :]
    finite = last[np.isfinite(last)]
    return float(finite.mean()) if len(finite) else math.nan


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _untrained(results: Results, arm: str) -> bool:
    return all(run.measured.training is None for run in results.of(arm))


def _mean_training(results: Results, arm: str, field: str) -> float:
    return float(np.mean([getattr(run.measured.training, field) for run in results.of(arm)]))
