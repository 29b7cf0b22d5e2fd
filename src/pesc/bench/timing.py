"""Timings that can be compared: interleaved, repeated, as medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pesc.machine.allocator import release_where_scarce

WARM_UPS = 6


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, over rounds in which everything compared ran once."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    def ratio(self, other: Timing) -> tuple[float, float, float]:
        """(median, lower quartile, upper quartile) of the ratio to another timing, round by round."""
        ratios = sorted(a / b for a, b in zip(self.seconds, other.seconds, strict=True))
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high


def interleave(
    functions: Mapping[str, Callable[[], object]], rounds: int, on_round: Callable[[int], None] = lambda done: None
) -> dict[str, Timing]:
    """Time functions in turns, so that a drifting machine hits all alike.

    Some turns before are not timed: the allocator still grows, and kernels are compiled. Each turn starts one later,
    A B C, B C A, C A B, so that what one leaves behind does not always hit the same other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(WARM_UPS + rounds):
        names = list(functions)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _synchronize()
            start = time.perf_counter()
            functions[name]()
            _synchronize()
            if turn >= WARM_UPS:
                seconds[name].append(time.perf_counter() - start)
            release_where_scarce()
        on_round(turn + 1)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
