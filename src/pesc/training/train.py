"""Train by a recipe: load, craft, tune, save; and go on where an interrupted run stopped."""

from __future__ import annotations

import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerState, set_seed
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOConfig, SFTConfig

from pesc.crafting.adapter import ADAPTER
from pesc.crafting.craft import craft
from pesc.crafting.load import RECIPE, locate
from pesc.crafting.lora import add_lora, train_experts
from pesc.crafting.surgery import crafted_ffns
from pesc.data.mixture import LEFT_OUT, Mixture, content_hash, prepare_mixture
from pesc.data.templates import set_chat_template
from pesc.interop.push import push_adapter
from pesc.machine.allocator import keep_freed_memory
from pesc.machine.memory import measure_peak_memory
from pesc.machine.quiet import quiet_libraries
from pesc.storage.files import write_json, write_text
from pesc.storage.lock import locked, refuse_vanished
from pesc.training.callbacks import METRICS, MetricsWriter, StopAtSignal, Stopped
from pesc.training.checkpoints import fault_of, last_checkpoint
from pesc.training.health import NotFiniteError, movement, starting_point, tell_movement
from pesc.training.held_out import patience_is_over
from pesc.training.quantization import quantization_options
from pesc.training.recipe import DPO_BETA, LoraSettings, Recipe, differences, load_recipe
from pesc.training.trainer import PescPreferenceTrainer, PescTrainer, Tuning

SUMMARY, DATA_DIGEST, CHECKPOINTS = "summary.json", "train_data.sha256", "checkpoints"
LOGS = "logs"


def train(recipe: Recipe, console: Console | None = None, label: str = "train") -> Path:
    """Run a recipe, or the rest of it if it was interrupted.

    The run's folder gets recipe.yaml, train_data.sha256, left_out.txt, metrics.jsonl, checkpoints/ while it runs, and
    summary.json and adapter/ at its end. A complete run is pushed to the hub, if the recipe says so.

    Args:
        recipe: the run.
        console: where progress is shown.
        label: what the progress bar is called.

    Returns:
        The adapter's folder. A run that is complete already is left as it is.

    Raises:
        BlockingIOError: another process trains in the output folder.
        FileNotFoundError, ValueError: for a model or data that is not there or not complete, and for an output folder
            that holds a run of another recipe or other data.
        ValueError: a loss or a gradient is not finite; it names the step, its examples and the last checkpoint.
        OSError: the hub did not take the adapter, which is complete; the same run tries again.
        Stopped: Ctrl-C or SIGTERM came while it trained; the same run goes on from the step that was in progress.
    """
    console = console or Console()
    run = recipe.output.folder
    _refuse_another_recipe(recipe)
    _refuse_other_data(recipe)
    if (run / ADAPTER).exists():
        console.print(f"{run} holds this run, complete: nothing to do", highlight=False, markup=False)
    else:
        with locked(run):
            _train(recipe, console, label)
    # Needed no more; also what a killed process left of them. The folder may be read-only.
    with suppress(OSError), locked(run):
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    if recipe.output.push_to_hub:
        _push(run, recipe.output.push_to_hub, console)
    return run / ADAPTER


def _push(run: Path, name: str, console: Console) -> None:
    try:
        with quiet_libraries():
            address = push_adapter(run, name)
    except OSError as error:
        raise OSError(f"{run} holds the complete run, but {error}: the same command tries again") from error
    console.print(f"pushed the adapter to {address}", highlight=False, markup=False)


def _train(recipe: Recipe, console: Console, label: str) -> None:
    run = recipe.output.folder
    _refuse_absent_reporters(recipe)
    keep_freed_memory()
    mixture, tokenizer = prepare_data(recipe, console)
    with quiet_libraries():
        model = build_model(recipe)
    recipe.save(run / RECIPE)
    write_text(run / DATA_DIGEST, mixture.digest + "\n")
    mixture.write_left_out(run / LEFT_OUT)
    writer = MetricsWriter(run / METRICS, console, label)
    with quiet_libraries():
        trainer = _build_trainer(recipe, model, tokenizer, mixture, writer)
        start = starting_point(model)
        try:
            with measure_peak_memory() as peak:
                state = _train_or_resume(trainer, run / CHECKPOINTS, console)
        except NotFiniteError as error:
            raise ValueError(_way_out(error, mixture, last_checkpoint(run / CHECKPOINTS, console))) from error
        finally:
            writer.stop()
    best = _best_checkpoint(state, run / CHECKPOINTS, console)
    if moved := movement(start, best / ADAPTER):
        console.print(tell_movement(moved), highlight=False, markup=False)
    summary = {**writer.summary(), "peak_memory_gb": peak.gigabytes, "moved": moved}
    write_json(run / SUMMARY, summary | {"best_step": state.best_global_step, "best_held_out_loss": state.best_metric})
    refuse_vanished(run)
    (best / ADAPTER).rename(run / ADAPTER)


def prepare_data(recipe: Recipe, console: Console) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """The examples that a recipe trains on, and the tokenizer with its chat template.

    Raises:
        FileNotFoundError, ValueError, OSError: as `prepare_mixture` and `set_chat_template` do.
    """
    tokenizer = locate(recipe.model.name).tokenizer()
    set_chat_template(tokenizer, recipe.data.chat_template)
    with quiet_libraries():
        pairs = recipe.training.objective == "dpo"
        mixture = prepare_mixture(recipe.data, tokenizer, recipe.training.seed, console, pairs=pairs)
    for line in mixture.notes():
        console.print(line, highlight=False, markup=False)
    return mixture, tokenizer


def build_model(recipe: Recipe) -> PreTrainedModel:
    """The model of a recipe as it starts to train: crafted, with LoRA, all else frozen."""
    set_seed(recipe.training.seed)
    model = locate(recipe.model.name).load(dtype=recipe.model.dtype, **quantization_options(recipe))
    if crafted_ffns(model):
        if recipe.pesc not in (None, model.config.pesc_config):
            raise ValueError(
                f"{recipe.model.name} is crafted already, with other settings than the recipe's pesc section: write "
                "pesc: null"
            )
    elif recipe.pesc is not None:
        craft(model, recipe.pesc)
    if recipe.lora is not None:
        # Once more: crafting drew random numbers, and LoRA starts from the same matrices with and without experts.
        set_seed(recipe.training.seed)
        add_lora(model, _lora_config(recipe.lora))
    train_experts(model, getattr(torch, recipe.training.trained_dtype))
    return model


def _build_trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture,
    writer: MetricsWriter,
) -> Tuning:
    training = recipe.training
    kind = PescPreferenceTrainer if training.objective == "dpo" else PescTrainer
    trainer = kind(
        model,
        args=_arguments(recipe),
        train_dataset=mixture.examples,
        eval_dataset={name: source.examples for name, source in mixture.held_out.items()} or None,
        processing_class=tokenizer,
        callbacks=[writer],
        router_learning_rate=training.router_learning_rate,
        experts_learning_rate=training.experts_learning_rate,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # by default beside the checkpoints, which do not last
            callback.logging_dir = str(recipe.output.folder / LOGS)
    trainer.early_stopping_patience = training.early_stopping_patience
    return trainer


def _lora_config(lora: LoraSettings) -> LoraConfig:
    targets = "all-linear" if lora.target_modules == ["all-linear"] else lora.target_modules
    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)


def _train_or_resume(trainer: Tuning, checkpoints: Path, console: Console) -> TrainerState:
    """The state at the end."""
    checkpoint = last_checkpoint(checkpoints, console)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps or patience_is_over(state, trainer.early_stopping_patience):
            return state
    with StopAtSignal() as stop:
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except pickle.UnpicklingError as error:  # transformers loads optimizer.pt and its like with weights_only
            raise ValueError(
                f"{checkpoint} was not read, as its optimizer, scheduler or random state holds more than tensors and "
                "numbers: remove that folder, and the run goes on from an earlier one"
            ) from error
    state = trainer.state
    if stop.received is not None:
        message = f"stopped after step {state.global_step} of {state.max_steps}: the same command goes on from there"
        raise Stopped(message, stop.received)
    return state


def _best_checkpoint(state: TrainerState, checkpoints: Path, console: Console) -> Path:
    """The one with the lowest held-out loss; without evaluations the last one."""
    best = checkpoints / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step or state.global_step}"
    if state.best_global_step:
        if fault := fault_of(best):
            raise ValueError(f"{best}, the best of the run, is damaged ({fault}): remove {checkpoints}, and try again")
        early = f"stopped early after step {state.global_step} of {state.max_steps}; "
        console.print(
            f"{early if state.global_step < state.max_steps else ''}the adapter is that of step "
            f"{state.best_global_step}, with the lowest held-out loss: {state.best_metric:.4f}",
            highlight=False,
            markup=False,
        )
    return best


def _way_out(error: NotFiniteError, mixture: Mixture, checkpoint: Path | None) -> str:
    last = f"the last good checkpoint, {checkpoint}," if checkpoint else "the start"
    return (
        f"{error}, computed on {mixture.rows_of(error.examples)}. The weights did not take it in. The same command "
        f"goes on from {last} and meets step {error.step} again: look at these rows, or choose another output.folder "
        "and a lower training.learning_rate"
    )


def _refuse_absent_reporters(recipe: Recipe) -> None:
    absent = set(recipe.output.report_to or []) - set(get_available_reporting_integrations())
    if absent:
        raise ValueError(f"output.report_to ({', '.join(sorted(absent))}) must be installed, or left out")


def _refuse_another_recipe(recipe: Recipe) -> None:
    run = recipe.output.folder
    if not (run / RECIPE).is_file():
        return
    try:
        there = load_recipe(run / RECIPE)
    except ValueError as error:
        raise ValueError(
            f"the recipe of the run in {run} is damaged, or of another version ({error}): remove that folder, or "
            "choose another output.folder"
        ) from error
    if changed := differences(recipe, there):
        raise ValueError(
            f"{run} holds a run of another recipe ({'; '.join(changed)}): choose another output.folder, or remove "
            "that folder"
        )


def _refuse_other_data(recipe: Recipe) -> None:
    run = recipe.output.folder
    digest = run / DATA_DIGEST
    if not digest.is_file():
        return
    try:
        changed = digest.read_text().strip() != content_hash(recipe.data)
    except FileNotFoundError:  # a run that is complete does not need its data
        return
    if changed:
        raise ValueError(
            f"the data have changed since the run in {run} began: choose another output.folder, or remove that folder"
        )


def _arguments(recipe: Recipe) -> SFTConfig | DPOConfig:
    training, data = recipe.training, recipe.data
    own: dict[str, Any]
    kind, own = SFTConfig, {"max_length": data.max_length, "packing": data.packing}
    own["dataset_kwargs"] = {"skip_prepare_dataset": True}
    if training.objective == "dpo":
        kind, own = DPOConfig, {"beta": training.dpo_beta or DPO_BETA, "max_length": None, "disable_dropout": False}
    return kind(
        **own,
        output_dir=str(recipe.output.folder / CHECKPOINTS),
        remove_unused_columns=False,  # the sampler needs their lengths
        num_train_epochs=training.epochs,
        max_steps=training.steps or -1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        optim=training.optim,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_ratio,
        max_grad_norm=training.max_grad_norm,
        weight_decay=0.0,
        gradient_checkpointing=training.gradient_checkpointing,
        # Autocast, where weights that train in float32 meet activations in bfloat16.
        bf16=recipe.model.dtype != training.trained_dtype,
        fp16=False,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused where there is no GPU
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if training.eval_steps else "no",
        eval_steps=training.eval_steps,
        per_device_eval_batch_size=training.batch_size,
        save_steps=recipe.output.save_steps,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=recipe.output.report_to or "none",
        run_name=recipe.output.folder.name,
        seed=training.seed,
        data_seed=training.seed,
    )
