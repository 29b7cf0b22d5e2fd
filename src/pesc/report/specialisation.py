"""What the routers did, in numbers and in words: how even the load is, how far the domains are told apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pesc.report.findings import number, tail
from pesc.report.results import ExpertCounts, Metrics


@dataclass(frozen=True)
class Specialisation:
    """How far the domains are routed apart: bits per layer, and the one largest shift."""

    bits: dict[int, float]
    most: float
    noise: dict[int, float]
    largest: tuple[str, int, int, float, float]
    """Domain, layer, expert, its share there, its share on the average domain."""

    @property
    def mean(self) -> float:
        """Mean over the layers that have experts, in bits."""
        return float(np.mean(list(self.bits.values())))

    @property
    def mean_noise(self) -> float:
        """Mean of the noise over the layers, in bits."""
        return float(np.mean(list(self.noise.values())))


def between_domains(experts: ExpertCounts) -> Specialisation:
    """Jensen-Shannon divergence between the domains' expert shares, per layer.

    With every domain weighing the same, it is the mutual information of domain and expert: how many bits one routed
    choice tells about the domain. Shares counted on few tokens differ by chance alone; `noise` is the divergence to
    expect from that, to first order and for independent draws.
    """
    names, bits, noise, shifts = list(experts.counts), {}, {}, []
    for layer in experts.layers:
        rows_DE = np.array([experts.shares(name, layer) for name in names])
        bits[layer] = max(0.0, _entropy(rows_DE.mean(0)) - float(np.mean([_entropy(row) for row in rows_DE])))
        used = int((rows_DE.sum(0) > 0).sum())
        inverse = sum(1 / max(experts.choices(name, layer).sum(), 1) for name in names)
        noise[layer] = (used - 1) * (len(names) - 1) / len(names) ** 2 / (2 * math.log(2)) * inverse
        domain, expert = np.unravel_index((rows_DE - rows_DE.mean(0)).argmax(), rows_DE.shape)
        here, usual = float(rows_DE[domain, expert]), float(rows_DE[:, expert].mean())
        shifts.append((here - usual, (names[domain], layer, int(expert), here, usual)))
    return Specialisation(bits, math.log2(len(names)), noise, max(shifts)[1])


def load_notes(experts: ExpertCounts, metrics: Metrics | None) -> str:
    """Whether a run's experts are all in use, from its training curve and from the held-out text."""
    text = ""
    if metrics is not None:
        level = tail(metrics["load_entropy"])
        words = {0.95: "is close to even on the whole", 0.8: "is uneven", -1: "has collapsed onto few experts"}
        word = next((word for bound, word in words.items() if level > bound), "cannot be told")
        text = f"The use of experts in training {word} (load entropy {number(level, 2)} at the end; 1 is even). "
    layers = [experts.shares(domain, layer) for domain in experts.counts for layer in experts.layers]
    loads = np.concatenate([row * len(row) for row in layers])
    idle = int((loads < 0.1).sum())
    return text + (
        f"On the domains' text the busiest expert of any layer gets {loads.max():.1f} times its even share, and"
        f" {idle} of the {len(loads)} domain-layer-expert cells get less than a tenth of it."
    )


def notes(experts: ExpertCounts) -> str:
    """The divergence in words: what it means and how large it is."""
    found = between_domains(experts)
    part = found.mean / found.most
    bounds = {0.01: "next to nothing", 0.05: "little", 0.2: "a fair amount"}
    word = next((word for bound, word in bounds.items() if part < bound), "a great deal")
    peak = max(found.bits, key=lambda layer: found.bits[layer])
    domain, layer, expert, here, usual = found.largest
    text = (
        f"Knowing which expert one choice went to tells {found.mean:.3f} bits about the domain, {part:.1%} of the"
        f" {found.most:.2f} bits that name one of {len(experts.counts)} domains: {word}. Layer {peak} tells the most"
        f" ({found.bits[peak]:.3f} bits). Chance alone would give about {found.mean_noise:.4f} bits, more if"
        f" neighbouring tokens route alike. The largest single shift: expert {expert} of layer {layer} takes"
        f" {here:.0%} of the choices on {domain}, against {usual:.0%} on the average domain."
    )
    if found.mean < 3 * found.mean_noise:
        text += " That is near the noise: the experts have not visibly specialised by domain."
    return text


def _entropy(shares: np.ndarray) -> float:
    kept = shares[shares > 0]
    return float(-(kept * np.log2(kept)).sum())
