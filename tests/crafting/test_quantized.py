"""4-bit loading: the dense weights are quantized, routers and adapters never are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from checkpoints import tiny_dense
from families import disturb
from pesc import PescConfig, craft
from pesc.crafting.load import load
from pesc.crafting.surgery import crafted_ffns, expert_parameters

bitsandbytes = pytest.importorskip("bitsandbytes")
CONFIG = PescConfig(num_experts=4, adapter_dim=8)
IDS = torch.arange(3, 14).unsqueeze(0)


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def test_a_crafted_folder_loads_with_its_experts_whole(tmp_path: Path) -> None:
    model = disturb(craft(load(tiny_dense(tmp_path / "dense")), CONFIG))
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=nf4(), dtype=torch.float32)
    _, ffn = crafted_ffns(loaded)[0]
    assert isinstance(ffn.gate_proj, bitsandbytes.nn.Linear4bit)
    for name, parameter in expert_parameters(loaded).items():
        assert torch.equal(parameter, expert_parameters(model)[name])
    assert loaded(IDS).logits.isfinite().all()


def test_a_quantized_model_is_crafted_with_identity_at_birth(tmp_path: Path) -> None:
    folder = tiny_dense(tmp_path / "dense")
    dense = load(folder, dtype=torch.float32, quantization_config=nf4())
    before = dense(IDS).logits
    crafted = craft(dense, CONFIG)
    assert torch.equal(crafted(IDS).logits, before)
    assert {p.dtype for p in expert_parameters(crafted).values()} == {torch.float32}
