"""How sure a mean difference is, with two sources of chance: the seed of a run and the choice of held-out examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean difference and its 95 % interval."""

    mean: float
    error: float
    """Standard error of the mean; NaN where one example is all there is."""
    low: float
    high: float
    by_seed: list[float]
    """The mean in each seed's run."""

    @property
    def num_seeds(self) -> int:
        """How many seeds it rests on."""
        return len(self.by_seed)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN with one."""
        return float(np.std(self.by_seed, ddof=1)) if self.num_seeds > 1 else math.nan

    @property
    def outcome(self) -> str:
        """`better` (lower), `worse`, `unclear` where the interval holds zero, or `unmeasured`."""
        if not math.isfinite(self.mean):
            return "unmeasured"
        if not self.low * self.high > 0:
            return "unclear"
        return "better" if self.mean < 0 else "worse"


def estimate(differences_SN: np.ndarray) -> Estimate:
    """Mean of differences over S seeds and the same N examples in each, with an interval.

    With one seed the interval covers the choice of examples alone: mean +- t * s / sqrt(N). With more, the variance of
    the mean is taken as the sum of two: that of the S seeds' means over S, and that of the N examples' means over N.
    For differences made of a seed's effect, an example's and both together (a crossed design), each part holds the
    variance of the third once, so their sum is never too small on average. Student's t has the degrees of freedom of
    Satterthwaite (1946, Biometrics Bulletin 2, 110-114) for such a sum.

    Args:
        differences_SN: [S, N]; not finite where a run diverged.
    """
    seeds, examples = differences_SN.shape
    with np.errstate(invalid="ignore"):
        by_seed, by_example = differences_SN.mean(1), differences_SN.mean(0)
        mean = float(by_seed.mean())
        parts = [_variance_of_mean(values) for values in ([by_example, by_seed] if seeds > 1 else [by_example])]
    variance = sum(parts)
    reach = error = math.sqrt(variance)
    if variance > 0:
        freedoms = zip(parts, (examples - 1, seeds - 1), strict=False)
        reach *= student_t(variance**2 / sum(part**2 / freedom for part, freedom in freedoms))
    return Estimate(mean, error, mean - reach, mean + reach, by_seed.tolist())


def student_t(freedom: float) -> float:
    """The value that Student's t exceeds, to both sides, in 5 % of cases.

    With t = sqrt(f) tan(u) its density is cos(u) ** (f - 1), which is summed over a fine grid.
    """
    end = min(math.pi / 2, 40 / math.sqrt(freedom))  # beyond, the density is nothing
    angles = (np.arange(200_000) + 0.5) * (end / 200_000)
    mass = np.cumsum(np.cos(angles) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(angles[np.searchsorted(mass, CONFIDENCE * mass[-1])])


def _variance_of_mean(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else math.nan
