"""A crafted model in trl's own trainers, without ours: it trains, router included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from checkpoints import tiny_dense, tiny_tokenizer
from families import disturb
from pesc import PescConfig, craft, craft_checkpoint
from pesc.crafting.adapter import save_adapter
from pesc.crafting.load import load
from pesc.crafting.lora import adapter_tensors, add_lora, train_experts
from pesc.crafting.surgery import expert_parameters

LORA = LoraConfig(target_modules=["q_proj"])
TEXTS = Dataset.from_list([{"text": f"count to {n}: one two three"} for n in range(8)])
QUIET = {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}


def tuned(folder: Path):
    """Crafted, with LoRA, from one seed."""
    torch.manual_seed(0)
    return add_lora(craft(load(folder), PescConfig(num_experts=4, adapter_dim=8)), LORA)


def train(model, folder: Path, resume: bool = False, **settings) -> SFTTrainer:
    fixed = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 2}
    args = SFTConfig(str(folder), **(QUIET | fixed | {"lr_scheduler_type": "constant"} | settings))
    trainer = SFTTrainer(model, args=args, train_dataset=TEXTS, eval_dataset=TEXTS, processing_class=tiny_tokenizer())
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


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


def test_a_run_with_lora_resumes_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense = tiny_dense(tmp_path / "dense")
    whole = train(tuned(dense), tmp_path / "whole").model
    train(tuned(dense), tmp_path / "run", max_steps=2)
    resumed = train(disturb(tuned(dense)), tmp_path / "run", resume=True).model
    expected = adapter_tensors(whole)
    assert all(torch.equal(expected[name], p) for name, p in adapter_tensors(resumed).items())
    assert "missing keys" not in caplog.text


def test_the_best_checkpoint_with_lora_is_loaded(tmp_path: Path) -> None:
    """The worst one here: it is not the last."""
    choice = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    model = tuned(tiny_dense(tmp_path / "dense"))
    trainer = train(model, tmp_path / "run", eval_strategy="steps", eval_steps=2, **choice)
    assert trainer.state.best_global_step == 2
    best = adapter_tensors(load(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(best[name], p) for name, p in adapter_tensors(model).items())


def test_checkpoints_that_could_not_be_written_are_refused_before_the_first_step(tmp_path: Path) -> None:
    model = tuned(tiny_dense(tmp_path / "dense"))
    model.config.name_or_path = ""
    with pytest.raises(ValueError, match="was not loaded from anywhere"):
        train(model, tmp_path / "run")
    assert not any(p.any() for name, p in adapter_tensors(model).items() if "lora_B" in name)
    train(model, tmp_path / "run", save_strategy="no", max_steps=1)
    assert all(p.any() for name, p in adapter_tensors(model).items() if "lora_B" in name)


PAIRS = [{"prompt": f"count to {n}:", "chosen": " one two"[: 2 * n], "rejected": " no"} for n in range(1, 5)]


def prefer(model, folder: Path, reference=None) -> float:
    """DPO's loss at the first step: log 2 if the reference is the model itself."""
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(str(folder), max_steps=1, save_strategy="no", logging_steps=1, **QUIET),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_the_reference_of_dpo_is_the_model_at_the_start(tmp_path: Path) -> None:
    """At birth its base is a right one. A tuned adapter has no folder from which trl could load it."""
    log_2 = pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    model = tuned(tiny_dense(tmp_path / "dense"))
    assert prefer(model, tmp_path / "run") == log_2
    save_adapter(disturb(model), tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"Unrecognized model in {tmp_path / 'adapter'}"):
        prefer(load(tmp_path / "adapter"), tmp_path / "run")
    loaded = load(tmp_path / "adapter")
    assert prefer(loaded, tmp_path / "run", reference=load(tmp_path / "adapter")) == log_2
    save_adapter(loaded, tmp_path / "next")
    assert load(tmp_path / "next").adapter_base == str(tmp_path / "dense")


def by_length(completions: list[str], **kwargs: object) -> list[float]:
    """A reward that a random model can raise."""
    return [float(len(text) % 3) for text in completions]


LABELLED = [{"prompt": f"count to {n}:", "completion": " one two"[: n + 2], "label": n % 2 == 0} for n in range(8)]
GENERATES = {"num_generations": 4, "max_completion_length": 8, "reward_funcs": by_length}


@pytest.mark.parametrize(
    ("kind", "config", "rows", "settings"),
    [
        (DPOTrainer, DPOConfig, PAIRS, {}),
        (KTOTrainer, KTOConfig, LABELLED, {}),
        (GRPOTrainer, GRPOConfig, [{"prompt": row["prompt"]} for row in LABELLED], GENERATES),
    ],
    ids=["DPO", "KTO", "GRPO"],
)
def test_trainers_on_preferences_and_rewards(
    kind: type, config: type, rows: list[dict], settings: dict, tmp_path: Path
) -> None:
    """All that trains moves, and a checkpoint holds it."""
    model = tuned(tiny_dense(tmp_path / "dense"))
    before = {name: p.detach().clone() for name, p in adapter_tensors(model).items()}
    settings = dict(settings)
    rewards = {name: settings.pop(name) for name in ["reward_funcs"] if name in settings}
    fixed = {"max_steps": 4, "save_steps": 4, "logging_steps": 1, "learning_rate": 0.01}
    trainer = kind(
        model,
        args=config(str(tmp_path / "run"), per_device_train_batch_size=4, **fixed, **QUIET, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        **rewards,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 4 and torch.tensor(losses).isfinite().all()
    after = adapter_tensors(model)
    assert not [name for name, p in after.items() if torch.equal(before[name], p)]
    saved = adapter_tensors(load(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(saved[name], p) for name, p in after.items())


@pytest.mark.parametrize(("kind", "config", "rows"), [(SFTTrainer, SFTConfig, TEXTS), (DPOTrainer, DPOConfig, PAIRS)])
def test_peft_config_trains_and_saves_routers_and_experts_or_warns(
    kind: type, config: type, rows: object, tmp_path: Path
) -> None:
    """With DPO, the reference is the model without what peft added, routers and experts included."""
    pesc = PescConfig(num_experts=4, adapter_dim=8)
    folder = craft_checkpoint(tiny_dense(tmp_path / "dense"), tmp_path / "crafted", pesc)
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    args = config(str(tmp_path / "run"), max_steps=2, save_steps=2, logging_steps=1, learning_rate=0.01, **QUIET)

    def trainer(**lora: object):
        adapter = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **lora)
        kwargs = {"args": args, "train_dataset": data, "processing_class": tiny_tokenizer(), "peft_config": adapter}
        return kind(load(folder), **kwargs)

    with pytest.warns(UserWarning, match="routers and experts are frozen"):
        trainer().train()
    trained = trainer(modules_to_save=["router", "experts"])
    trained.train()
    if kind is DPOTrainer:
        assert trained.state.log_history[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    ids, before = torch.tensor([[5, 6, 7, 8]]), load(folder).eval()
    saved = PeftModel.from_pretrained(load(folder), tmp_path / "run" / "checkpoint-2").eval()
    assert torch.equal(saved(ids).logits, trained.model.eval()(ids).logits)
    start, end = expert_parameters(before), dict(saved.named_parameters())
    for name, parameter in start.items():
        part = "router" if ".router." in name else "experts"
        kept = name.replace(f".{part}.", f".{part}.modules_to_save.default.")
        assert not torch.equal(parameter, end[f"base_model.model.{kept}"])
