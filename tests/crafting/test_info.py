"""What `pesc info` says is what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import pesc
from checkpoints import tiny_dense, without_sums
from families import disturb
from pesc import PescConfig, craft, craft_checkpoint
from pesc.crafting.cost import count_parameters
from pesc.crafting.info import describe
from pesc.crafting.load import load
from pesc.crafting.surgery import crafted_ffns

CONFIG = PescConfig(num_experts=4, num_experts_per_tok=1, adapter_dim=8, layers=[1])


def test_counts_of_a_crafted_model(tmp_path: Path) -> None:
    model = load(tiny_dense(tmp_path / "dense"))
    dense = count_parameters(model)
    assert (dense.total, dense.active, dense.trained) == (model.num_parameters(), model.num_parameters(), 0)
    counts = count_parameters(craft(model, CONFIG))
    expert, router = 2 * 32 * 8, 4 * 32
    assert counts.total == dense.total + 4 * expert + router
    assert counts.active == dense.total + expert + router
    assert counts.trained == 4 * expert + router


def test_lora_counts_as_trained_but_not_in_the_total(tmp_path: Path) -> None:
    model = load(tiny_dense(tmp_path / "dense"))
    total = count_parameters(model).total
    pesc.add_lora(model, LoraConfig(r=4, target_modules=["q_proj"]))
    counts = count_parameters(model)
    assert (counts.total, counts.trained) == (total, 2 * (4 * 32 + 32 * 4))


def test_a_fresh_craft_is_all_untouched(tmp_path: Path) -> None:
    out = craft_checkpoint(tiny_dense(tmp_path / "dense"), tmp_path / "out", CONFIG)
    info = describe(out)
    assert (info.kind, info.family, info.crafted_layers, info.missing) == ("crafted", "llama", [1], [])
    assert info.untouched == [f"model.layers.1.mlp.experts.{i}" for i in range(4)]
    loaded = load(out)
    assert info.parameters["total"] == loaded.num_parameters()


def test_untouched_and_missing_experts_are_named(tmp_path: Path) -> None:
    model = disturb(craft(load(tiny_dense(tmp_path / "dense")), CONFIG))
    with torch.no_grad():
        crafted_ffns(model)[0][1].experts.down_proj[2].zero_()
    model.save_pretrained(tmp_path / "out")
    assert describe(tmp_path / "out").untouched == ["model.layers.1.mlp.experts.2"]
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.up_proj"]
    save_file(tensors, file, {"format": "pt"})
    assert describe(tmp_path / "out").missing == ["model.layers.1.mlp.experts.up_proj"]


def test_experts_of_another_number_than_promised_are_named(tmp_path: Path) -> None:
    out = without_sums(craft_checkpoint(tiny_dense(tmp_path / "dense"), tmp_path / "out", CONFIG))
    config = json.loads((out / "config.json").read_text())
    config["pesc"]["num_experts"] = 6
    (out / "config.json").write_text(json.dumps(config))
    assert "model.layers.1.mlp.router.weight" in describe(out).wrong_shape


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    base = tiny_dense(tmp_path / "dense")
    model = pesc.add_lora(craft(load(base), CONFIG), LoraConfig(r=4, target_modules="all-linear"))
    pesc.save_adapter(model, tmp_path / "run" / "adapter")
    info = describe(tmp_path / "run")
    assert (info.kind, info.base_model, info.lora["r"]) == ("adapter", str(base), 4)
    assert info.parameters == vars(count_parameters(model))


def test_a_truncated_model_is_an_error(tmp_path: Path) -> None:
    base = tiny_dense(tmp_path / "dense")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or truncated"):
        describe(base)
