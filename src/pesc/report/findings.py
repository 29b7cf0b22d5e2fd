"""What the numbers of a run say, in words. Pure functions: no files, no drawing, no HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pesc.report.results import BASE, DENSE, PAIR, PESC, Metrics, Results, Routing, Run

CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Comparison:
    """PESC against dense + LoRA on one domain; a negative mean favours PESC."""

    domain: str
    mean: float
    error: float
    outcome: str
    sentence: str


@dataclass(frozen=True)
class Specialisation:
    """How far the domains are routed apart: bits per layer, and the one largest shift."""

    bits: dict[int, float]
    most: float
    noise: float
    largest: tuple[str, int, int, float, float]

    @property
    def mean(self) -> float:
        """Mean over the layers that have experts, in bits."""
        return float(np.mean(list(self.bits.values())))


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def number(value: float, digits: int = 3) -> str:
    """A float for people; what is not finite says so instead of reading `nan`."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def signed(value: float, digits: int = 3) -> str:
    """As `number`, with a sign, and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "\u2212") if math.isfinite(value) else "not finite"


def outcome(mean: float, error: float, rows: int) -> str:
    """`better`, `worse`, `unclear` or `unmeasured`; one row has no spread to judge by, whatever its error."""
    if not math.isfinite(mean):
        return "unmeasured"
    if rows < 2 or not math.isfinite(error) or mean == 0 or abs(mean) < CLEAR * error:
        return "unclear"
    return "better" if mean < 0 else "worse"


def compare(results: Results) -> list[Comparison]:
    """The comparison the run was made for, domain by domain."""
    found = []
    for domain in results.domains:
        mean, error = results.differences[PAIR][domain]
        result = outcome(mean, error, results.held_out_rows[domain])
        pesc, dense = results.model(PESC).loss[domain], results.model(DENSE).loss[domain]
        sentence = {
            "better": f"PESC is better: its loss is lower by {number(-mean)}",
            "worse": f"PESC is worse: its loss is higher by {number(mean)}",
            "unclear": f"no clear difference: PESC differs by {signed(mean)}",
            "unmeasured": "no verdict: a loss is not a finite number",
        }[result]
        sentence += f", standard error {number(error)} ({number(pesc)} against {number(dense)})."
        if result in ("better", "worse") and (pesc - dense) * mean < 0:
            sentence += " Row by row and over all tokens at once the two point opposite ways; trust neither."
        found.append(Comparison(domain, mean, error, result, sentence))
    return found


def headline(comparisons: Sequence[Comparison]) -> str:
    """The verdict in one sentence."""
    groups = {
        result: [c.domain for c in comparisons if c.outcome == result]
        for result in ("better", "worse", "unclear", "unmeasured")
    }
    count = len(comparisons)
    everywhere = f"in all {count} domains" if count > 1 else f"on {comparisons[0].domain}"
    if len(groups["better"]) == count:
        return f"Sparse wins: PESC beats dense + LoRA {everywhere}."
    if len(groups["worse"]) == count:
        return f"Sparse loses: PESC is behind dense + LoRA {everywhere}."
    if len(groups["unclear"]) == count:
        return f"No clear difference between PESC and dense + LoRA {everywhere}."
    if len(groups["unmeasured"]) == count:
        return f"No verdict: a held-out loss is not a finite number {everywhere}."
    words = {
        "better": "better on {}",
        "worse": "worse on {}",
        "unclear": "not clearly different on {}",
        "unmeasured": "without a finite loss to compare on {}",
    }
    parts = [words[result].format(listed(names)) for result, names in groups.items() if names]
    kind = "A mixed result" if groups["better"] and groups["worse"] else "A partial result"
    return f"{kind}: PESC is {listed(parts)}, against dense + LoRA."


def against_base(results: Results) -> str:
    """Whether training helped at all, before asking which kind helped more."""
    base = results.model(BASE)
    lowered = {
        name: [d for d in results.domains if results.model(name).loss[d] < base.loss[d]] for name in (DENSE, PESC)
    }
    if all(lower == results.domains for lower in lowered.values()):
        return "Against the untrained base, both trained models lower the held-out loss on every domain."
    parts = []
    for name, lower in lowered.items():
        other = [d for d in results.domains if d not in lower]
        if not other:
            parts.append(f"{name} lowers the held-out loss on every domain")
        elif not lower:
            parts.append(f"{name} does not lower the held-out loss on any domain")
        else:
            parts.append(f"{name} lowers the held-out loss on {listed(lower)} but not on {listed(other)}")
    return f"Against the untrained base, {listed(parts)}."


def cost(results: Results) -> str:
    """What the sparse model costs beside the dense one."""
    dense, pesc = results.model(DENSE), results.model(PESC)
    seconds, memory = results.setup["seconds"], results.setup["peak_memory_gb"]
    text = f"PESC trained {millions(pesc.trained)} parameters"
    if dense.trained:
        text += f", {pesc.trained / dense.trained:.1f} times the {millions(dense.trained)} of dense + LoRA"
    return text + (
        f", and took {number(seconds['pesc'], 0)} s against {number(seconds['dense'], 0)} s, with"
        f" {number(memory['pesc'], 1)} GB at its peak against {number(memory['dense'], 1)} GB."
    )


def millions(count: int) -> str:
    """A parameter count with a unit."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def tail(values: np.ndarray) -> float:
    """Mean of the finite values in the last tenth of a curve: where it ended, without the jitter."""
    last = values[-max(1, len(values) // 10) :]
    finite = last[np.isfinite(last)]
    return float(finite.mean()) if len(finite) else math.nan


def curve_notes(run: Run) -> str:
    """Where the training curves ended, and whether anything in them was not a number."""
    text = (
        f"Mean over the last tenth of the logged steps: dense + LoRA {number(tail(run.dense['loss']))},"
        f" PESC {number(tail(run.pesc['loss']))}."
    )
    for name, metrics in ((DENSE, run.dense), (PESC, run.pesc)):
        bad = int((~np.isfinite(metrics["loss"])).sum())
        if bad:
            text += f" Of the {len(metrics['loss'])} logged losses of {name}, {bad} are not finite."
    return text


def balance_notes(metrics: Metrics, routing: Routing) -> str:
    """Whether the experts are all in use, from the training curve and from the held-out text."""
    level = tail(metrics["balance"])
    word = (
        "cannot be told"
        if not math.isfinite(level)
        else "is close to even on the whole"
        if level > 0.95
        else "is uneven"
        if level > 0.8
        else "has collapsed onto few experts"
    )
    loads = np.concatenate([load for domain in routing.shares for load in loads_of(routing, domain).values()])
    idle = int((loads < 0.1).sum())
    return (
        f"The use of experts in training {word} (balance {number(level, 2)} at the end; 1 is perfectly"
        f" even). On the domains' text the busiest expert of any layer gets {loads.max():.1f} times its"
        f" even share,"
        f" and {idle} of the {len(loads)} domain-layer-expert cells get less than a tenth of it."
    )


def loads_of(routing: Routing, domain: str) -> dict[int, np.ndarray]:
    """Share times the number of experts, by layer: 1 is even, whatever the layer's number of experts."""
    return {layer: row * len(row) for layer, row in enumerate(routing.shares[domain]) if row is not None}


def shifts_of(routing: Routing, domain: str) -> dict[int, np.ndarray]:
    """Share in the domain minus the mean over the domains, by layer."""
    found = {}
    for layer, row in enumerate(routing.shares[domain]):
        if row is not None:
            every = [other for rows in routing.shares.values() if (other := rows[layer]) is not None]
            found[layer] = row - np.mean(every, axis=0)
    return found


def specialisation(routing: Routing, tokens: dict[str, int]) -> Specialisation:
    """Jensen-Shannon divergence between the domains' expert shares, per layer.

    With every domain weighing the same, it is the mutual information of domain and expert: what one
    routed choice gives away about the domain. Shares counted on few tokens differ by chance alone;
    `noise` is the divergence to expect from that, to first order and for independent draws.
    """
    names = list(routing.shares)
    bits, noise = {}, []
    inverse = sum(1 / max(tokens[name], 1) for name in names)
    for layer in routing.sparse_layers:
        rows_DE = np.array([routing.shares[name][layer] for name in names])
        bits[layer] = max(0.0, _entropy(rows_DE.mean(0)) - float(np.mean([_entropy(row) for row in rows_DE])))
        used = int((rows_DE.sum(0) > 0).sum())
        scale = (len(names) - 1) / len(names) ** 2 / (2 * math.log(2) * routing.num_experts_per_tok[layer])
        noise.append((used - 1) * scale * inverse)
    _, domain, layer, expert = max(
        (float(shift.max()), name, layer, int(shift.argmax()))
        for name in names
        for layer, shift in shifts_of(routing, name).items()
    )
    row = routing.shares[domain][layer]
    assert row is not None
    here, shift = float(row[expert]), float(shifts_of(routing, domain)[layer][expert])
    return Specialisation(
        bits, math.log2(len(names)), float(np.mean(noise)), (domain, layer, expert, here, here - shift)
    )


def _entropy(shares: np.ndarray) -> float:
    kept = shares[shares > 0]
    return float(-(kept * np.log2(kept)).sum())


def specialisation_notes(found: Specialisation, num_domains: int) -> str:
    """The divergence in words: what it means and how large it is."""
    part = found.mean / found.most
    word = (
        "next to nothing"
        if part < 0.01
        else "little"
        if part < 0.05
        else "a fair amount"
        if part < 0.2
        else "a great deal"
    )
    peak = max(found.bits, key=lambda layer: found.bits[layer])
    domain, layer, expert, here, usual = found.largest
    text = (
        f"Seeing which expert one choice went to gives away {found.mean:.3f} bits, {part:.1%} of the"
        f" {found.most:.2f} bits it takes to name one of {num_domains} domains: {word}. Layer {peak} tells"
        f" the domains apart best ({found.bits[peak]:.3f} bits). Counted on the held-out tokens, chance alone"
        f" would give about {found.noise:.4f} bits, more if neighbouring tokens route alike."
        f" The largest single shift: expert {expert} of layer {layer} takes {here:.0%} of the choices on"
        f" {domain}, against {usual:.0%} on the average domain."
    )
    if found.mean < 3 * found.noise:
        text += " That is near the noise: the experts have not visibly specialised by domain."
    return text


def caveats(results: Results) -> list[str]:
    """What keeps the verdict from being more than it is, the weightiest first."""
    dense, pesc, base = results.model(DENSE), results.model(PESC), results.model(BASE)
    rows, tokens, setup = results.held_out_rows, results.held_out_tokens, results.setup
    held = listed([f"{rows[d]:,} rows ({tokens[d]:,} tokens) of {d}" for d in results.domains])
    found = []
    if dense.trained and pesc.trained > 1.1 * dense.trained:
        found.append(
            f"Not a control of equal size: PESC trains {millions(pesc.trained - dense.trained)} more"
            " parameters than dense + LoRA, so a lower loss may come from more weights and not from their"
            " being sparse."
        )
    found.append(
        f"One run of each model, one seed ({setup['seed']}). Another seed may move any difference by more"
        " than its standard error, which covers only the choice of held-out rows."
    )
    if base.total < 1_000_000_000:
        found.append(
            f"A small model ({millions(base.total)} parameters): this tests the workings of the"
            " method, not its worth at scale."
        )
    found.append(
        f"Held out: {held}."
        + (" With so few rows the standard error is itself rough." if min(rows.values()) < 30 else "")
    )
    found.append(
        f"A difference counts as clear from {CLEAR:g} standard errors on. Chance alone lifts about one"
        f" comparison in twenty over that; here there {'are' if len(rows) > 1 else 'is'} {len(rows)}."
    )
    found.append(
        f"Training saw {setup['tokens']:,} tokens in {setup['steps']:,} steps. What holds at this budget need"
        " not hold at another."
    )
    found.append(
        "What was measured is the loss on reference answers, not a score on a task. The answers shown are"
        " examples, too few to count from."
    )
    return found
