"""The router's losses reach the gradient once, at their weight, whoever trains: against the written-out definition."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import GradientState
from datasets import Dataset
from torch.nn import functional as F
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import pesc
from checkpoints import tiny_dense, tiny_tokenizer
from definition import (
    Document,
    Gradients,
    assert_same,
    batched,
    dft,
    documents,
    dpo_gradients,
    gradients,
    plain_copy,
    router_loss,
    run_alone,
    step_gradients,
)
from families import disturb, tiny_model
from pesc import PescConfig, craft, set_router_loss_scale
from pesc.data.chat import IGNORE_INDEX
from pesc.training.router_loss import RouterLossScale
from pesc.training.trainer import PescTrainer, RoutingMetrics

METHOD = {
    "num_experts": [4, 3, 5],
    "num_experts_per_tok": [2, 1, 2],
    "adapter_dim": 8,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.05,
}
# Nine documents in micro-batches of two: with accumulation over two, the last step has one micro-batch of one.
DOCUMENTS = documents(9)
STEPS = batched(batched(DOCUMENTS, 2), 2)
PACKED = {"padding_free": True, "max_length": None}


def crafted(**settings):
    return disturb(craft(tiny_model("llama"), PescConfig(**(METHOD | settings))))


class Keep(transformers.TrainerCallback):
    """Keeps the gradients of every step as the optimizer sees them."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append(gradients(model))


def arguments(kind: type, folder: Path, **settings):
    """Two micro-batches of two a step, in the order of the data; the weights stay as they are."""
    fixed = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return kind(output_dir=str(folder), **(fixed | settings))


def padded(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right."""
    width = max(len(example["input_ids"]) for example in examples)
    lengths = torch.tensor([[len(example["input_ids"])] for example in examples])
    filled = {
        name: torch.tensor([e[name] + [value] * (width - len(e[name])) for e in examples])
        for name, value in (("input_ids", 0), ("labels", IGNORE_INDEX))
    }
    return filled | {"attention_mask": (torch.arange(width) < lengths).long()}


def examples(found: list[Document]) -> list[dict]:
    return [{"input_ids": ids, "labels": labels} for ids, labels in found]


def trained(kind: type, model, args, **kwargs):
    """The gradients of each step of a run, and the trainer."""
    keep = Keep()
    kwargs = {"train_dataset": Dataset.from_list(examples(DOCUMENTS)), "callbacks": [keep]} | kwargs
    trainer = kind(model=model, args=args, **kwargs)
    trainer.train()
    assert model.base_model.router_loss_scale is None
    return keep.steps, trainer


def check(ours: list[Gradients], steps=STEPS, **definition) -> None:
    # A fresh model: trl replaces the forward of the one that it trains.
    for found, step in zip(ours, steps, strict=True):
        assert_same(found, step_gradients(crafted(), step, **definition))


def own_loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """A caller's own language loss, made from the logits."""
    losses = F.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
    return losses.sum() / ((labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


# Trainers: language loss over all tokens of the step, router losses averaged over its micro-batches.


@pytest.mark.parametrize(
    ("settings", "kwargs"),
    [
        ({}, {}),
        ({"gradient_checkpointing": True}, {}),
        ({}, {"compute_loss_func": own_loss}),
    ],
    ids=["plain", "checkpointed", "own loss"],
)
def test_transformers_trainer(settings: dict, kwargs: dict, tmp_path: Path) -> None:
    model = crafted()
    args = arguments(transformers.TrainingArguments, tmp_path, **settings)
    steps, _ = trained(transformers.Trainer, model, args, data_collator=padded, **kwargs)
    check(steps)


def test_transformers_trainer_that_counts_no_items(tmp_path: Path) -> None:
    """It divides the loss of each micro-batch, so the language model's is a mean of means; the router's is the same."""
    model = crafted()
    model.accepts_loss_kwargs = False
    args = arguments(transformers.TrainingArguments, tmp_path)
    steps, _ = trained(transformers.Trainer, model, args, data_collator=padded)
    check(steps, mean_of_means=True)


def test_label_smoothing_looks_at_the_next_token(tmp_path: Path) -> None:
    """As for the dense family, whose class the trainer knows by name."""
    losses = []
    for model in (tiny_model("llama"), craft(tiny_model("llama"), PescConfig(**METHOD))):
        args = arguments(transformers.TrainingArguments, tmp_path, label_smoothing_factor=0.1)
        data = Dataset.from_list(examples(DOCUMENTS))
        trainer = transformers.Trainer(model, args, data_collator=padded, train_dataset=data)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_data_without_a_length(tmp_path: Path) -> None:
    model = crafted()
    stream = Dataset.from_list(examples(DOCUMENTS[:8])).to_iterable_dataset()
    args = arguments(transformers.TrainingArguments, tmp_path, max_steps=2)
    steps, _ = trained(transformers.Trainer, model, args, data_collator=padded, train_dataset=stream)
    check(steps, STEPS[:2])


def test_a_scaler_of_gradients_scales_the_routers_too(tmp_path: Path) -> None:
    """accelerate has one for float16, which needs a GPU; here it is put in for float32."""

    class Scaled(transformers.Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    model = crafted()
    steps, _ = trained(Scaled, model, arguments(transformers.TrainingArguments, tmp_path), data_collator=padded)
    check([{name: gradient / 1024 for name, gradient in step.items()} for step in steps])


@pytest.mark.parametrize(
    ("settings", "token_loss"),
    [
        ({}, None),
        ({"loss_type": "dft"}, dft),
        (PACKED, None),
        ({"gradient_checkpointing": True}, None),
    ],
    ids=["nll", "dft", "packed", "checkpointed"],
)
def test_sft_trainer(settings: dict, token_loss: Callable | None, tmp_path: Path) -> None:
    model = crafted()
    steps, trainer = trained(
        SFTTrainer, model, arguments(SFTConfig, tmp_path, **settings), processing_class=tiny_tokenizer()
    )
    assert not trainer.aux_loss_enabled
    check(steps, **({"token_loss": token_loss} if token_loss else {}))


def test_router_logits_in_the_config_do_not_count_the_loss_twice(tmp_path: Path) -> None:
    """trl then adds a balance loss of its own, which has no gradient."""
    alike = {"num_experts": 4, "num_experts_per_tok": 2}
    model = crafted(**alike)
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = 0.5
    steps, trainer = trained(SFTTrainer, model, arguments(SFTConfig, tmp_path), processing_class=tiny_tokenizer())
    assert trainer.aux_loss_enabled
    for found, step in zip(steps, STEPS, strict=True):
        assert_same(found, step_gradients(crafted(**alike), step))


@pytest.mark.skipif(
    not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ, reason="needs a GPU, or TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("trainer", [transformers.Trainer, SFTTrainer])
def test_liger(trainer: type, tmp_path: Path) -> None:
    """By its switch it knows no crafted family; by hand it puts its output layer in front of the model's forward."""
    liger = pytest.importorskip("liger_kernel.transformers")
    model = crafted()
    if trainer is SFTTrainer:
        args, kwargs = arguments(SFTConfig, tmp_path, use_liger_kernel=True), {"processing_class": tiny_tokenizer()}
    else:
        args, kwargs = arguments(transformers.TrainingArguments, tmp_path), {"data_collator": padded}
        layers = {"rope": False, "swiglu": False, "rms_norm": False, "cross_entropy": False}
        liger.apply_liger_kernel_to_llama(**layers, fused_linear_cross_entropy=True, model=model)
    steps, _ = trained(trainer, model, args, **kwargs)
    check(steps)


class InOrder(PescTrainer):
    """`pesc train`'s trainer, with the examples in the order of the data."""

    _get_train_sampler = transformers.Trainer._get_train_sampler


@pytest.mark.parametrize(
    "settings", [{}, PACKED, {"gradient_checkpointing": True}], ids=["padded", "packed", "checkpointed"]
)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU path", "GPU path"])
def test_pesc_trainer(on_cpu: bool, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PescTrainer, "scores_labelled_positions", on_cpu)
    model = crafted()
    steps, trainer = trained(
        InOrder, model, arguments(SFTConfig, tmp_path, **settings), processing_class=tiny_tokenizer()
    )
    check(steps)
    model = crafted()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ("entropy" in logs[0]) != on_cpu
    for log, step in zip(logs, STEPS, strict=True):
        balance = [router_loss(plain_balance(model), routed(model, micro_batch)).item() for micro_batch in step]
        assert log["aux_loss"] == pytest.approx(sum(balance) / len(balance), rel=1e-4)
        assert 0 < log["load_entropy"] <= 1
        assert log["loss"] == pytest.approx(language_loss(model, step), rel=1e-4)
    assert logs[-1]["num_tokens"] == sum(len(ids) for ids, _ in DOCUMENTS)


def plain_balance(model):
    """A model with the balance loss alone, at weight 1."""
    model = plain_copy(model)
    model.config.pesc = PescConfig(**(METHOD | {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.0}))
    return model


def routed(model, micro_batch) -> list[list[torch.Tensor]]:
    return [run_alone(plain_copy(model), ids)[1] for ids, _ in micro_batch]


def language_loss(model, step) -> float:
    found = [document for micro_batch in step for document in micro_batch]
    batch = padded(examples(found))
    with torch.no_grad():
        return plain_copy(model)(**batch).loss.item()


# DPO: the router's losses are those of chosen and rejected answers together, as one micro-batch.

PAIRS = [
    {"prompt": f"count to {n}:", "chosen": " " + "one two three "[: 2 * n], "rejected": " no" * (n % 3 + 1)}
    for n in range(1, 6)
]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dpo_trainer(checkpointed: bool, tmp_path: Path) -> None:
    class Trainer(RoutingMetrics, DPOTrainer):
        pass

    method = PescConfig(**(METHOD | {"num_experts": [4, 3], "num_experts_per_tok": [2, 1]}))
    model = disturb(craft(pesc.load(tiny_dense(tmp_path / "dense")), method))
    reference = disturb(copy.deepcopy(model), seed=1)
    untouched = copy.deepcopy(model), copy.deepcopy(reference)
    steps, trainer = trained(
        Trainer,
        model,
        arguments(DPOConfig, tmp_path, gradient_checkpointing=checkpointed),
        ref_model=reference,
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(PAIRS),
    )
    assert not trainer.aux_loss_enabled
    rows = list(trainer.train_dataset)
    for found, step in zip(steps, batched(batched(rows, 2), 2), strict=True):
        assert_same(found, dpo_gradients(*untouched, step))
    assert "load_entropy" in trainer.state.log_history[0]
    assert all(parameter.grad is None for parameter in reference.parameters())


# Loops of one's own.


def loop(model, step, backward: Callable) -> Gradients:
    model.train()
    for micro_batch in step:
        backward(model, padded(examples(micro_batch)))
    return gradients(model)


def test_a_loop_that_uses_the_models_loss() -> None:
    model = crafted()
    ours = loop(model, STEPS[0], lambda model, batch: (model(**batch).loss / 2).backward())
    assert_same(ours, step_gradients(model, STEPS[0], mean_of_means=True))


def test_a_loop_that_adds_micro_batches_up_before_it_goes_back() -> None:
    model = crafted().train()
    model.gradient_checkpointing_enable()
    (sum(model(**padded(examples(micro_batch))).loss for micro_batch in STEPS[0]) / 2).backward()
    assert_same(gradients(model), step_gradients(model, STEPS[0], mean_of_means=True))


def test_a_loop_with_a_loss_of_its_own() -> None:
    model = crafted()

    def backward(model, batch, scale: float = 1.0) -> None:
        labels = batch.pop("labels")
        (own_loss(model(**batch), labels) * scale).backward()

    ours = loop(model, STEPS[0][:1], backward)
    assert_same(ours, step_gradients(model, STEPS[0][:1]))
    model.zero_grad()
    set_router_loss_scale(model, 1 / 2)
    ours = loop(model, STEPS[0], lambda model, batch: backward(model, batch, 1 / 2))
    assert_same(ours, step_gradients(model, STEPS[0], mean_of_means=True))


def test_labels_whose_loss_is_not_used_lose_nothing() -> None:
    model = crafted()
    ours = loop(model, STEPS[0][:1], lambda model, batch: own_loss(model(**batch), batch["labels"]).backward())
    assert_same(ours, step_gradients(model, STEPS[0][:1]))


def test_a_loop_that_counts_its_items_says_how_many_micro_batches_there_are() -> None:
    model = crafted().train()
    items = sum(label != IGNORE_INDEX for micro_batch in STEPS[0] for _, labels in micro_batch for label in labels[1:])

    def backward(model, batch) -> None:
        model(**batch, num_items_in_batch=items).loss.backward()

    with pytest.raises(ValueError, match="num_items_in_batch hides how the loss is scaled.*set_router_loss_scale"):
        loop(model, STEPS[0], backward)
    set_router_loss_scale(model, 1 / 2)
    assert_same(loop(model, STEPS[0], backward), step_gradients(model, STEPS[0]))


@pytest.mark.parametrize("own", [False, True], ids=["model's loss", "own loss"])
def test_a_loop_of_accelerates(own: bool) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = crafted()

    def backward(model, batch) -> None:
        with accelerator.accumulate(model):
            outputs = model(**batch)
            accelerator.backward(own_loss(outputs, batch["labels"]) if own else outputs.loss)

    try:
        assert_same(loop(model, STEPS[0], backward), step_gradients(model, STEPS[0], mean_of_means=True))
    finally:
        GradientState._reset_state()


def test_a_loop_with_a_scaler_of_gradients() -> None:
    scaler, model = torch.amp.GradScaler("cpu", init_scale=1024.0), crafted()
    ours = loop(model, STEPS[0], lambda model, batch: scaler.scale(model(**batch).loss / 2).backward())
    expected = step_gradients(model, STEPS[0], mean_of_means=True)
    assert_same({name: gradient / 1024 for name, gradient in ours.items()}, expected)
    batch = padded(examples(STEPS[0][0]))
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16 autocast without labels"):
        model(input_ids=batch["input_ids"])


@pytest.mark.parametrize("kind", ["added", "bool", "by kind of layer"])
def test_padding_in_four_dimensions_does_not_count(kind: str) -> None:
    model = crafted()

    def backward(model, batch) -> None:
        real_BS = batch.pop("attention_mask").bool()
        length = real_BS.shape[1]
        seen = (torch.ones(length, length).tril().bool() & real_BS[:, None])[:, None]
        mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        model(**batch, attention_mask={"full_attention": mask} if kind == "by kind of layer" else mask).loss.backward()

    if kind == "by kind of layer":
        model = disturb(craft(tiny_model("smollm3"), PescConfig(**METHOD)))
    assert_same(loop(model, STEPS[0][:1], backward), step_gradients(model, STEPS[0][:1]))


def test_packed_documents_without_a_mask_all_count() -> None:
    model = crafted()

    def backward(model, batch) -> None:
        found = STEPS[0][0]
        ids = torch.tensor([[token for document, _ in found for token in document]])
        labels = torch.tensor([[label for _, labels in found for label in labels]])
        positions = torch.cat([torch.arange(len(document)) for document, _ in found])[None]
        model(ids, position_ids=positions, labels=labels, use_cache=False).loss.backward()

    assert_same(loop(model, STEPS[0][:1], backward), step_gradients(model, STEPS[0][:1]))


@pytest.mark.parametrize("part", ["model", "layers"])
def test_a_compiled_model_loses_nothing(part: str) -> None:
    """It runs first without anything that watches the routers."""
    torch._dynamo.reset()
    model, step = crafted(), STEPS[0][:1]
    model.set_experts_implementation("batched_mm")
    for module in [model] if part == "model" else model.model.layers:
        module.compile(backend="eager")
    with torch.no_grad():
        model(torch.tensor([DOCUMENTS[3][0]]), use_cache=False)
    ours = loop(model, step, lambda model, batch: model(**batch, use_cache=False).loss.backward())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same(ours, step_gradients(uncompiled(model), step))


def uncompiled(model):
    for module in [model, *model.model.layers]:
        module._compiled_call_impl = None
    return model


# What cannot be right is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_aux_loss_coef": 0.0}, r"router_aux_loss_coef \(0.0\) must be left out.*PescConfig"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
    ],
    ids=str,
)
def test_a_weight_in_trls_arguments_is_refused(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trained(SFTTrainer, crafted(), arguments(SFTConfig, tmp_path, **settings), processing_class=tiny_tokenizer())


def test_trainers_that_hide_their_scale_are_refused(tmp_path: Path) -> None:
    args = arguments(transformers.TrainingArguments, tmp_path)
    trainer = transformers.Trainer(crafted(), args, data_collator=padded, train_dataset=examples(DOCUMENTS))
    trainer.remove_callback(RouterLossScale)
    with pytest.raises(ValueError, match="num_items_in_batch hides how the loss is scaled"):
        trainer.train()
    for settings, message in (
        ({"n_gpu": 2}, "2 GPUs in one process"),
        ({"n_gpu": 1, "fp16": True}, "fp16 must be off"),
    ):
        with pytest.raises(ValueError, match=message):
            RouterLossScale().on_train_begin(SimpleNamespace(**settings), None, None, model=crafted(), optimizer=None)


# Two processes.


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Each takes every second micro-batch: the first step has four of them, the last two."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    subprocess.run([*command, str(tmp_path)], env=environment, check=True, capture_output=True)
    steps = batched(batched(documents(12), 2), 4)
    for run in torch.load(tmp_path / "gradients.pt"):
        for found, step in zip(run, steps, strict=True):
            assert_same(found, step_gradients(crafted(), step))


def _one_of_two_processes(folder: Path) -> None:
    data = Dataset.from_list(examples(documents(12)))
    runs = []
    for kind, config, kwargs in (
        (transformers.Trainer, transformers.TrainingArguments, {"data_collator": padded}),
        (SFTTrainer, SFTConfig, {"processing_class": tiny_tokenizer()}),
        (InOrder, SFTConfig, {"processing_class": tiny_tokenizer()}),
    ):
        steps, trainer = trained(kind, crafted(), arguments(config, folder), train_dataset=data, **kwargs)
        assert trainer.accelerator.num_processes == 2
        runs.append(steps)
    if trainer.is_world_process_zero():
        torch.save(runs, folder / "gradients.pt")


if __name__ == "__main__":
    _one_of_two_processes(Path(sys.argv[1]))
