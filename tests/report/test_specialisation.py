"""How far domains are routed apart, against what chance gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pesc.report import specialisation
from pesc.report.results import ExpertCounts
from pesc.report.specialisation import Specialisation
from studies import make_counts


def divergence(*rows: list[int]) -> Specialisation:
    return specialisation.between_domains(
        ExpertCounts([2], {str(index): [list(row)] for index, row in enumerate(rows)})
    )


def test_specialisation_runs_from_nothing_to_the_full_bits() -> None:
    assert divergence([500, 500], [500, 500]).mean == 0
    apart = divergence([1000, 0], [0, 1000])
    assert apart.mean == apart.most == 1
    assert apart.largest[3:] == (1.0, 0.5)


def test_the_noise_is_what_chance_gives() -> None:
    rng = np.random.default_rng(0)
    drawn = [divergence(*(rng.multinomial(2000, [0.125] * 8).tolist() for _ in range(3))) for _ in range(200)]
    assert np.mean([case.mean for case in drawn]) == pytest.approx(drawn[0].mean_noise, rel=0.1)


def test_layers_without_a_choice_are_passed_over() -> None:
    experts = ExpertCounts([None, 1, 2], {"a": [None, [9], [8, 2]], "b": [None, [5], [2, 8]]})
    assert experts.layers == [2]
    assert experts.shares("a", 2) == pytest.approx([0.8, 0.2])
    assert list(specialisation.between_domains(experts).bits) == [2]
    assert "gets 1.6 times its even share" in specialisation.load_notes(experts, None)


def test_notes_say_where_the_domains_part() -> None:
    notes = specialisation.notes(ExpertCounts([2], {"a": [[900, 100]], "b": [[200, 800]]}))
    assert "a great deal" in notes
    assert "expert 1 of layer 0 takes 80% of the choices on b, against 45%" in notes
    same = make_counts(["a"], 2, 4)
    assert "near the noise" in specialisation.notes(
        replace(same, counts={"a": same.counts["a"], "b": same.counts["a"]})
    )
