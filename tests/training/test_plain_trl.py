"""A crafted model in trl's own SFTTrainer, without ours: it trains, router included."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from checkpoints import tiny_dense, tiny_tokenizer
from pesc import PescConfig, craft, craft_checkpoint
from pesc.crafting.load import load
from pesc.crafting.lora import train_experts
from pesc.crafting.surgery import expert_parameters


def test_trl_trains_experts_and_router(tmp_path: Path) -> None:
    model = craft(load(tiny_dense(tmp_path / "dense")), PescConfig(num_experts=4, adapter_dim=8))
    train_experts(model)
    before = {name: p.detach().clone() for name, p in expert_parameters(model).items()}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(str(tmp_path / "run"), max_steps=3, bf16=False, report_to="none", save_strategy="no"),
        train_dataset=Dataset.from_list([{"text": "count to three: one two three"}] * 8),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert not trainer.aux_loss_enabled  # trl's own, which merges all layers
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert not any(torch.equal(before[name], p) for name, p in expert_parameters(model).items())
    assert model.config.pesc_config.router_aux_loss_coef == 0.01


def test_trl_loads_a_crafted_folder_by_path_and_saves_checkpoints(tmp_path: Path) -> None:
    folder = craft_checkpoint(
        tiny_dense(tmp_path / "dense"), tmp_path / "crafted", PescConfig(num_experts=4, adapter_dim=8)
    )
    trainer = SFTTrainer(
        str(folder),
        args=SFTConfig(str(tmp_path / "run"), max_steps=1, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([{"text": "one two three"}] * 4),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1").config.pesc_config.num_experts == 4
