"""Train by a recipe: load, craft, tune, save; and go on where an interrupted run stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import datasets
import torch
import yaml
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTConfig

from pesc.crafting.adapter import load_adapter_weights, save_adapter
from pesc.crafting.craft import craft
from pesc.crafting.load import locate
from pesc.crafting.lora import add_lora, train_experts
from pesc.crafting.surgery import crafted_ffns
from pesc.data.chat import encode_rows
from pesc.data.formats import read_rows
from pesc.machine.allocator import keep_freed_memory
from pesc.machine.memory import measure_peak_memory
from pesc.machine.quiet import quiet_libraries
from pesc.training.callbacks import METRICS, MetricsWriter
from pesc.training.recipe import Recipe
from pesc.training.trainer import PescTrainer

RECIPE, SUMMARY, DATA_DIGEST = "recipe.yaml", "summary.json", "train_data.sha256"
CHECKPOINTS = "checkpoints"


def train(recipe: Recipe, console: Console | None = None, label: str = "train") -> Path:
    """Run a recipe, or the rest of it if it was interrupted.

    The run's folder gets recipe.yaml, train_data.sha256, metrics.jsonl, checkpoints/ while it runs, and summary.json
    and adapter/ at its end.

    Args:
        recipe: the run.
        console: where progress is shown.
        label: what the progress bar is called.

    Returns:
        The adapter's folder. A run that is complete already is left as it is.

    Raises:
        FileNotFoundError, ValueError: for a model or data that is not there or not whole, and for an output folder
            that holds a run of another recipe or other data.
    """
    console = console or Console()
    adapter = recipe.output / "adapter"
    _refuse_another_recipe(recipe)
    _refuse_other_data(recipe)
    if adapter.exists():
        console.print(f"{recipe.output} holds this run, complete: nothing to do")
        return adapter
    keep_freed_memory()
    tokenizer = locate(recipe.model).tokenizer()
    rows = _encoded_rows(recipe, tokenizer, console)
    with quiet_libraries():
        model = build_model(recipe)
    recipe.output.mkdir(parents=True, exist_ok=True)
    recipe.save(recipe.output / RECIPE)
    (recipe.output / DATA_DIGEST).write_text(_digest(recipe.train_data) + "\n")
    writer = MetricsWriter(recipe.output / METRICS, console, label)
    with quiet_libraries():
        trainer = _build_trainer(recipe, model, tokenizer, rows, writer)
        try:
            with measure_peak_memory() as peak:
                _train_or_resume(trainer, recipe.output)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from the last checkpoint")
            raise
        finally:
            writer.stop()
    summary = {**writer.summary(), "peak_memory_gb": peak.gigabytes}
    (recipe.output / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return save_adapter(trainer.model, adapter)


def _build_trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    writer: MetricsWriter,
) -> PescTrainer:
    trainer = PescTrainer(
        model,
        args=_arguments(recipe),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[writer],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_model(recipe: Recipe) -> PreTrainedModel:
    """The model of a recipe as it starts to train: crafted, with LoRA, all else frozen."""
    set_seed(recipe.seed)
    model = locate(recipe.model).load(dtype=recipe.dtype)
    if crafted_ffns(model):
        if recipe.method not in (None, model.config.method):
            raise ValueError(
                f"{recipe.model} is crafted already, with other settings than the recipe's method: write method: null"
            )
    elif recipe.method is not None:
        craft(model, recipe.method)
    if recipe.lora is None:
        train_experts(model)
    else:
        targets = recipe.lora.target_modules
        add_lora(
            model,
            LoraConfig(
                r=recipe.lora.r,
                lora_alpha=recipe.lora.alpha,
                lora_dropout=recipe.lora.dropout,
                target_modules="all-linear" if targets == ["all-linear"] else targets,
            ),
        )
    return model


def _train_or_resume(trainer: PescTrainer, output: Path) -> None:
    for folder in (output / CHECKPOINTS).glob("checkpoint-*"):
        if not _is_complete(folder):
            shutil.rmtree(folder)
    checkpoint = last_checkpoint(output)
    if checkpoint is not None and trainer.is_finished_at(checkpoint):
        load_adapter_weights(trainer.model, Path(checkpoint) / "adapter")
    else:
        trainer.train(resume_from_checkpoint=checkpoint)


def _is_complete(checkpoint: Path) -> bool:
    # The trainer writes this file last.
    return (checkpoint / "trainer_state.json").is_file()


def last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint of a run; None when there is none."""
    found = [folder for folder in (output / CHECKPOINTS).glob("checkpoint-*") if _is_complete(folder)]
    return str(max(found, key=lambda folder: int(folder.name.split("-")[-1]))) if found else None


def _encoded_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> list[dict[str, list[int]]]:
    rows = read_rows(recipe.train_data)
    encoded = encode_rows(rows, tokenizer, recipe.max_length)
    if encoded.split:
        console.print(
            f"{encoded.split} of {len(rows)} conversations became a row for each answer, since the chat template "
            "rewrites earlier turns"
        )
    if encoded.cut or encoded.dropped:
        console.print(
            f"{encoded.cut} of {len(encoded.rows) + encoded.dropped} rows were cut to {recipe.max_length} tokens; "
            f"{encoded.dropped} dropped, which had nothing to learn within that length"
        )
    if not encoded.rows:
        raise ValueError(f"{recipe.train_data} has no row with anything to learn within {recipe.max_length} tokens")
    return encoded.rows


def _refuse_another_recipe(recipe: Recipe) -> None:
    path = recipe.output / RECIPE
    wanted = recipe.to_dict()
    if path.is_file():
        try:
            there = yaml.safe_load(path.read_text())
        except yaml.YAMLError:
            there = None
        if not isinstance(there, dict):
            raise ValueError(f"{path} is damaged: remove {recipe.output}, or choose another output")
        changed = [
            f"{key}: {there.get(key)} there, {wanted.get(key)} asked for"
            for key in sorted(there.keys() | wanted.keys())
            if there.get(key) != wanted.get(key)
        ]
        if changed:
            raise ValueError(
                f"{recipe.output} holds a run of another recipe ({'; '.join(changed)}): choose another output, or "
                "remove that folder"
            )


def _refuse_other_data(recipe: Recipe) -> None:
    path = recipe.output / DATA_DIGEST
    # A run that is complete does not need its data.
    if path.is_file() and recipe.train_data.is_file() and path.read_text().strip() != _digest(recipe.train_data):
        raise ValueError(
            f"{recipe.train_data} has changed since the run in {recipe.output} began: choose another output, or remove "
            "that folder"
        )


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _arguments(recipe: Recipe) -> SFTConfig:
    return SFTConfig(
        output_dir=str(recipe.output / CHECKPOINTS),
        max_length=recipe.max_length,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        # Rows of like length together: padding is arithmetic for nothing.
        train_sampling_strategy="group_by_length",
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=recipe.warmup_ratio,
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=0.0,
        gradient_checkpointing=recipe.gradient_checkpointing,
        # The weights have the recipe's dtype themselves; nothing is cast on the way.
        bf16=False,
        fp16=False,
        logging_steps=1,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        seed=recipe.seed,
        data_seed=recipe.seed,
    )
