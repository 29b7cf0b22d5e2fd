"""Numbers that no model has are refused before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pesc.crafting.refusals import refuse_absurd_numbers


@pytest.mark.parametrize(
    "values",
    [
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1.0},
        {"layer_norm_epsilon": 1e308},
        {"a": [{"b": float("inf")}]},
        {"rope_parameters": {"rope_theta": 0}},
        {"num_hidden_layers": 10**6},
        {"max_position_embeddings": -1},
        {"pesc": {"num_experts": [8, 10**400]}},
    ],
)
def test_absurd_numbers_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"config\.json: \w+ \(.+\) must be"):
        refuse_absurd_numbers(values, Path("config.json"))


def test_usual_numbers_pass() -> None:
    values = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "eps": None, "time_step_limit": [0.0, float("inf")]}
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"x": nested}
    refuse_absurd_numbers(values | nested, Path("config.json"))
