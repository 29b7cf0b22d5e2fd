"""What tuning adds to trl's trainers: parts that any of them can take, and the two trainers of `pesc train`."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, Trainer
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pesc.crafting.backbone import watch_routing
from pesc.crafting.surgery import expert_parameters
from pesc.data.chat import IGNORE_INDEX
from pesc.data.prepare import column
from pesc.machine.allocator import release_where_scarce
from pesc.method.routing import Routing, load_entropy
from pesc.training.checkpoints import AdapterCheckpoints
from pesc.training.health import WINDOW, FiniteSteps, starved
from pesc.training.held_out import HeldOutLoss
from pesc.training.loss import summed_loss
from pesc.training.sampler import LengthGroupedSampler

_COUNTS = "expert_counts"
"""Where the trainer's state, and so every checkpoint, keeps the counts of the window in progress."""


class RoutingMetrics(Trainer):
    """Logs what the routers did: `aux_loss` and `load_entropy`, means over micro-batches and processes.

    At the end of each window of steps also what `pesc.training.health.starved` finds in it.
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; the router's losses reach the gradient inside the model."""
        with watch_routing(self.model) as passes:
            loss = super().compute_loss(*args, **kwargs)
        for routing in passes:
            if routing.loss.requires_grad:  # not that of an evaluation, or of DPO's reference
                self._record(routing)
        return loss

    def _record(self, routing: Routing) -> None:
        counts, window = routing.counts(), self.state.stateful_callbacks
        before = window.get(_COUNTS) or [0] * len(counts)
        window[_COUNTS] = [(layer + torch.tensor(old)).tolist() for layer, old in zip(counts, before, strict=True)]
        values = torch.tensor([[routing.aux_loss.item(), load_entropy(counts)]], device=self.args.device)
        for name, value in zip(("aux_loss", "load_entropy"), self.accelerator.gather(values).mean(dim=0), strict=True):
            self._metrics["train"][name].append(value.item())

    def log(self, logs: dict[str, Any], *args: Any) -> None:
        """As in the parent class."""
        if "loss" in logs and self.state.global_step % WINDOW == 0:
            config, window = self.model.config, self.state.stateful_callbacks.pop(_COUNTS, None)
            if window:
                counts = [torch.tensor(layer, device=self.args.device) for layer in window]
                layers = config.pesc_config.for_layers(config.num_hidden_layers)
                logs |= starved(self.accelerator.reduce(counts, "sum"), layers)
        super().log(logs, *args)


class LabelledPositions(Trainer):
    """Computes the SFT loss from plain logits at the labelled positions, on a CPU.

    trl's output layer, in chunks over all positions, saves the logits' memory on a GPU. On a CPU it scores every
    position, and a training step takes half as long again.
    """

    @property
    def scores_labelled_positions(self) -> bool:
        """Whether this run computes its loss so, and not as trl does."""
        return self.args.device.type == "cpu"

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean loss of a labelled token of the optimizer step; without `num_items_in_batch`, of the micro-batch.

        `return_outputs` must be left out on a CPU: no logits are kept.
        """
        if not self.scores_labelled_positions:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert not return_outputs
        loss = summed_loss(model, **inputs).sum()
        if self.model.training:
            self._count_tokens(inputs)
        if num_items_in_batch is None:
            return loss / (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        # The items are those of all processes, over which gradients are averaged.
        return loss * self.accelerator.num_processes / num_items_in_batch

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        # As trl does; packed examples come without a mask, and without padding.
        tokens = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        self._total_train_tokens += int(self.accelerator.gather(tokens).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]


class Tuning(HeldOutLoss, FiniteSteps, RoutingMetrics, AdapterCheckpoints):
    """What `pesc train` adds to a trainer of trl, for crafted models and for dense ones with LoRA.

    Args:
        router_learning_rate: peak rate of the routers; None for `learning_rate`.
        experts_learning_rate: peak rate of the experts; None for `learning_rate`.
        kwargs: passed to trl's trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        router_learning_rate: float | None = None,
        experts_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        # trl would round what trains beside quantized weights to bfloat16.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        super().__init__(model, **kwargs)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._rates = {"router": router_learning_rate, "experts": experts_learning_rate}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the parent class, with learning rates of their own for routers and experts."""
        super().create_optimizer(model)
        for part, rate in self._rates.items():
            if rate is not None:
                self._split_group(part, rate)
        return self.optimizer

    def _split_group(self, part: str, rate: float) -> None:
        names = expert_parameters(self.model)
        own = {id(parameter) for name, parameter in names.items() if f".{part}." in name}
        for group in list(self.optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in own]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                self.optimizer.add_param_group(group | {"params": moved, "lr": rate})

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths = column(train_dataset or self.train_dataset, "length").tolist()
        return LengthGroupedSampler(
            lengths, self.args.train_batch_size, self.args.seed, epoch=lambda: int(self.state.epoch or 0)
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in the parent class; then returns freed memory to the system if the machine is short of it."""
        loss = super().training_step(*args, **kwargs)
        release_where_scarce()
        return loss


class PescTrainer(Tuning, LabelledPositions, SFTTrainer):
    """Tunes on conversations."""


class PescPreferenceTrainer(Tuning, DPOTrainer):
    """Tunes on preference pairs (DPO, arXiv 2305.18290), against the model as it is when the trainer is built.

    Args:
        kwargs: as of `Tuning`; `train_dataset` is what `pesc.data.prepare.PairEncoder` makes.
    """

    def __init__(self, model: PreTrainedModel, **kwargs: Any) -> None:
        padding = 0  # masked, so any token does
        super().__init__(model, ref_model=_frozen_copy(model), data_collator=_PairCollator(padding), **kwargs)

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any) -> datasets.Dataset:
        return dataset

    def _items(self, batch: dict[str, torch.Tensor]) -> int:
        return len(batch["input_ids"]) // 2


class _PairCollator(DataCollatorForPreference):
    """Pads the answers of pairs, and names their parts as trl does."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = []
        for example in examples:
            chosen = [label for label in example["labels"] if label != IGNORE_INDEX]
            prompt = example["input_ids"][: -len(chosen)]
            pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": example["rejected_ids"]})
        batch: dict[str, Any] = super().torch_call(pairs)
        return batch


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that stays as the model is now. Both share what does not train, so it takes little memory."""
    # Layers and not only their weights, as those of bitsandbytes keep a part of a weight beside it.
    layers = [module for module in model.modules() if not list(module.children()) and list(module.parameters())]
    shared = [layer for layer in layers if not any(parameter.requires_grad for parameter in layer.parameters())]
    return copy.deepcopy(model, {id(layer): layer for layer in shared}).requires_grad_(False).eval()
