"""Intervals: they hold the truth as often as they say, whatever decides the differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pesc.report.statistics import estimate, student_t


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (31, 2.03951), (1e6, 1.95997)]
)
def test_students_t_as_in_tables(freedom: float, value: float) -> None:
    assert student_t(freedom) == pytest.approx(value, rel=1e-4)


def test_one_seed_gives_the_plain_interval_of_a_mean() -> None:
    found = estimate(np.array([[1.0, 2.0, 3.0, 6.0]]))
    error = math.sqrt(np.var([1, 2, 3, 6], ddof=1) / 4)
    assert (found.mean, found.error) == pytest.approx((3.0, error))
    assert found.high - found.mean == pytest.approx(student_t(3) * error)
    assert math.isnan(found.spread)


def test_several_seeds_add_the_spread_between_them() -> None:
    one = np.array([[0.1, 0.3, 0.2, 0.2]])
    several = np.concatenate([one - 0.2, one, one + 0.2])
    found = estimate(several)
    assert found.mean == pytest.approx(0.2)
    assert found.spread == pytest.approx(0.2)
    assert found.error == pytest.approx(math.sqrt(0.2**2 / 3 + estimate(one).error ** 2))
    assert estimate(one).outcome == "worse"
    assert found.outcome == "unclear"


@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_example", "by_both"),
    [(1, 0.0, 0.1, 0.1), (3, 0.02, 0.1, 0.05), (3, 0.0, 0.1, 0.0), (3, 0.1, 0.1, 0.1), (5, 0.0, 0.0, 0.1)],
)
def test_the_interval_holds_the_truth(seeds: int, by_seed: float, by_example: float, by_both: float) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        differences_SN = by_seed * rng.standard_normal((seeds, 1)) + by_example * rng.standard_normal((1, 32))
        found = estimate(differences_SN + by_both * rng.standard_normal((seeds, 32)))
        held += found.low <= 0 <= found.high
    assert held / 300 > 0.91


def test_one_example_is_never_clear() -> None:
    for differences in ([[-5.0]], [[-5.0], [-5.1], [-5.2]]):
        assert estimate(np.array(differences)).outcome == "unclear"


def test_what_is_not_finite_is_not_measured() -> None:
    assert estimate(np.array([[1.0, math.nan], [1.0, 2.0]])).outcome == "unmeasured"
    assert estimate(np.full((1, 3), math.inf)).outcome == "unmeasured"


def test_an_exact_difference_is_clear_and_none_is_not() -> None:
    assert estimate(np.full((1, 4), -0.5)).outcome == "better"
    assert estimate(np.zeros((3, 4))).outcome == "unclear"
