"""PescConfig: every field checked, every message names value and rule."""

from __future__ import annotations

import pytest

from pesc import PescConfig
from pesc.config import LayerConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, r"num_experts \(0\) must be an integer of at least 1"),
        ({"num_experts": 2.0}, r"num_experts \(2.0\) must be an integer"),
        ({"num_experts": True}, r"num_experts \(True\) must be an integer"),
        ({"num_experts": []}, r"num_experts \(\[\]\) must be an integer .* or a non-empty list of integers"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be at most num_experts \(8\)"),
        ({"num_experts": [4, 2], "num_experts_per_tok": 3}, r"must be at most num_experts \(\[4, 2\]\)"),
        ({"num_experts": [4, 2], "num_experts_per_tok": [2, 2, 2]}, "list 2 and 3 values"),
        ({"adapter_dim": -1}, r"adapter_dim \(-1\) must be an integer"),
        ({"adapter_placement": "sequental"}, r"did you mean 'sequential'"),
        ({"adapter_activation": "relu"}, r"adapter_activation \('relu'\) must be one of gelu, swiglu"),
        ({"adapter_scaling": 0}, r"adapter_scaling \(0\) must be a number above 0"),
        ({"adapter_scaling": float("nan")}, r"adapter_scaling \(nan\) must be a number above 0"),
        ({"adapter_dropout": 1.0}, r"adapter_dropout \(1.0\) must be a number of at least 0 and below 1"),
        ({"router_aux_loss_coef": -0.1}, r"router_aux_loss_coef \(-0.1\) must be a number of at least 0"),
        ({"router_z_loss_coef": "x"}, r"router_z_loss_coef \('x'\) must be a number of at least 0"),
        ({"layers": []}, r"layers \(\[\]\) must be a non-empty list of integers"),
        ({"layers": [2, 1]}, "ascending order"),
        ({"layers": [1, 1]}, "each once"),
        ({"layers": [-1]}, r"layers \(\[-1\]\) must be .* integers of at least 0"),
    ],
)
def test_every_rule_is_checked(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PescConfig(**settings)


def test_all_broken_rules_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_experts .*adapter_scaling.*layers"):
        PescConfig(num_experts=0, adapter_scaling=-1, layers=[])


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"num_expert is unknown \(did you mean num_experts\?\)"):
        PescConfig.from_dict({"num_expert": 4})


def test_round_trip_through_plain_values() -> None:
    config = PescConfig(num_experts=[4, 8], num_experts_per_tok=2, adapter_dim=[16, 32], layers=[0, 2])
    assert PescConfig.from_dict(config.to_dict()) == config


def test_lists_give_one_value_a_crafted_layer() -> None:
    config = PescConfig(
        num_experts=[4, 8],
        num_experts_per_tok=2,
        adapter_dim=[16, 32],
        layers=[0, 2],
        adapter_placement="parallel",
        adapter_scaling=0.25,
    )
    layers = config.for_layers(3)
    assert list(layers) == [0, 2]
    assert layers[2] == LayerConfig(
        num_experts=8,
        num_experts_per_tok=2,
        adapter_dim=32,
        adapter_placement="parallel",
        adapter_activation="gelu",
        adapter_scaling=0.25,
        adapter_dropout=0.0,
    )


def test_lists_and_layers_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match=r"adapter_dim lists 2 values, but 3 layers"):
        PescConfig(adapter_dim=[16, 32]).for_layers(3)
    with pytest.raises(ValueError, match=r"layers \(\[7\]\) must be below the model's number of layers \(3\)"):
        PescConfig(layers=[1, 7]).for_layers(3)
