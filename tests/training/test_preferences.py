"""DPO by a recipe: pairs are learned, against the model as it was at the start."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import pesc.training.train as training
from checkpoints import write_pairs
from definition import assert_same, dpo_gradients, gradients
from families import disturb
from pesc import PescConfig, load, train
from pesc.crafting.lora import adapter_tensors
from pesc.interop.formats import export
from pesc.training.recipe import LoraSettings
from pesc.training.trainer import PescPreferenceTrainer
from runs import interrupt_after, make_recipe, metrics


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def recipe(tmp_path: Path, **changes: Any):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 14)
    return make_recipe(tmp_path, **({"objective": "dpo", "train": pairs} | changes))


def test_it_learns_what_is_preferred(tmp_path: Path, console: Console) -> None:
    train(recipe(tmp_path, steps=20), console)
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert sum(line["loss"] for line in lines[-3:]) < 0.5
    for line in lines:
        margin = line["rewards/chosen"] - line["rewards/rejected"]
        assert line["rewards/margins"] == pytest.approx(margin, abs=1e-4)
    assert lines[-1]["rewards/accuracies"] == 1
    assert "load_entropy" in lines[0]
    assert "right preferences 100%" in console.file.getvalue()
    start = dict(training.build_model(recipe(tmp_path)).named_parameters())
    after = dict(load(tmp_path / "run").named_parameters())
    moved = {name for name, p in start.items() if not torch.equal(p, after[name])}
    assert moved == set(adapter_tensors(load(tmp_path / "run")))


@pytest.mark.parametrize(
    "changes",
    [
        {"pesc": None},
        {"lora": None},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"dpo_beta": 0.5, "router_learning_rate": 0.1},
        {"dtype": "bfloat16", "quantization": "nf4"},
        {"quantization": "int8"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_way_to_train_starts_at_its_reference(tmp_path: Path, console: Console, changes: dict) -> None:
    if "quantization" in changes:
        pytest.importorskip("bitsandbytes")
    train(recipe(tmp_path, **({"steps": 3} | changes)), console)
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert lines[2]["rewards/margins"] != 0
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_gradients_are_those_of_the_definition(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that has moved away from its reference."""
    method = PescConfig(num_experts=[4, 3], num_experts_per_tok=[2, 1], adapter_dim=8, router_aux_loss_coef=0.5)
    asked = recipe(tmp_path, pesc=method, steps=1, gradient_accumulation_steps=2, dpo_beta=0.3)
    start, plain = training.build_model(asked), PescPreferenceTrainer.training_step
    moved = disturb(training.build_model(asked), seed=3)
    step, found = [], {}

    def watched(self, model, inputs, *args):
        step.append(pairs_of(inputs))
        with torch.no_grad():
            for name, parameter in adapter_tensors(self.model).items():
                parameter.copy_(moved.get_parameter(name))
        loss = plain(self, model, inputs, *args)
        found.update(gradients(self.model))
        return loss

    monkeypatch.setattr(PescPreferenceTrainer, "training_step", watched)
    train(asked, console)
    assert [len(micro_batch) for micro_batch in step] == [2, 2]
    assert_same(found, dpo_gradients(moved, start, step, beta=0.3))


def pairs_of(inputs: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    """The pairs of a micro-batch, whose chosen answers come first."""
    pairs = []
    for rows in zip(
        *(inputs[name].chunk(2) for name in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        parts = []
        for ids, real, answer in zip(*rows, strict=True):
            parts.append((ids[real.bool() & ~answer.bool()].tolist(), ids[answer.bool()].tolist()))
        pairs.append(parts)
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in zip(*pairs, strict=True)
    ]


def test_held_out_pairs_are_scored_and_change_nothing(tmp_path: Path, console: Console) -> None:
    alone = load_file(train(recipe(tmp_path, folder=tmp_path / "alone"), console) / "adapter.safetensors")
    held_out = {"eval": str(write_pairs(tmp_path / "other.jsonl", 5)), "eval_steps": 2}
    measured = load_file(train(recipe(tmp_path, **held_out), console) / "adapter.safetensors")
    found = [line["held_out"]["other"] for line in metrics(tmp_path / "run") if "held_out" in line]
    assert math.log(2) > found[0] > found[1] > found[2]
    assert all(torch.equal(alone[name], measured[name]) for name in alone)


@pytest.mark.parametrize("base", ["dense", "tuned"])
def test_an_interrupted_run_resumes_to_the_same_end(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """Against the same reference, whether experts are new or have been tuned before."""
    changes: dict[str, Any] = {"lora": LoraSettings(r=4, alpha=8, dropout=0.3)}
    if base == "tuned":
        train(make_recipe(tmp_path, lora=None, folder=tmp_path / "tuned", steps=2), console)
        changes["name"] = str(export(tmp_path / "tuned", tmp_path / "crafted", "pesc"))
    whole = train(recipe(tmp_path, folder=tmp_path / "whole", **changes), console)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 5)
        train(recipe(tmp_path, **changes), console)
    resumed = train(recipe(tmp_path, **changes), console)
    one, other = load_file(whole / "adapter.safetensors"), load_file(resumed / "adapter.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    timed = {"tokens_per_second", "elapsed"}
    first, second = (
        [{k: v for k, v in line.items() if k not in timed} for line in metrics(tmp_path / run)]
        for run in ("whole", "run")
    )
    assert first == second


def test_a_step_that_is_not_finite_names_the_pairs(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PescPreferenceTrainer.compute_loss
    monkeypatch.setattr(
        PescPreferenceTrainer, "compute_loss", lambda *args, **kwargs: plain(*args, **kwargs) * math.inf
    )
    with pytest.raises(ValueError, match=r"step 1: the loss is inf, computed on .*pairs.jsonl, row \d+, \d+\."):
        train(recipe(tmp_path), console)


def test_rows_without_two_answers_are_no_examples(tmp_path: Path, console: Console) -> None:
    with pytest.raises(
        ValueError, match="12 of 12 rows are no examples:\n.*no 'chosen', which a row of format preference"
    ):
        train(recipe(tmp_path, train=tmp_path / "rows.jsonl"), console)
