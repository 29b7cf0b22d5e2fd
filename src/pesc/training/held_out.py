"""Held-out data while a run trains: its loss by source, the best step, and the stop when nothing improves."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from transformers import Trainer, TrainerControl, TrainerState

from pesc.data.chat import IGNORE_INDEX
from pesc.data.prepare import column


class HeldOutLoss(Trainer):
    """Evaluates without a data loader, as one would draw random numbers and so change the run that it measures."""

    control: TrainerControl
    early_stopping_patience: int | None = None
    """Evaluations without a lower loss after which training ends."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss of each held-out source and their mean, in nats; arguments are ignored.

        The trainer's state keeps the lowest mean and its step, and so does the checkpoint that is asked for then.
        """
        self.model.eval()
        for layer in self.model.modules():
            if type(layer).__name__ == "Linear4bit":  # in eval mode, bitsandbytes rounds its weights again on a CPU
                layer.train()
        losses = {name: self._loss(examples) for name, examples in self.eval_dataset.items()}
        mean = float(np.mean(list(losses.values())))
        if mean < (np.inf if self.state.best_metric is None else self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = mean, self.state.global_step
            self.control.should_save = True
        if patience_is_over(self.state, self.early_stopping_patience):
            self.control.should_save = self.control.should_training_stop = True
        metrics = {"eval_loss": mean} | {f"eval_{name}_loss": loss for name, loss in losses.items()}
        self.log(dict(metrics))
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _loss(self, examples: datasets.Dataset) -> float:
        """On every process the same examples: forward passes of a sharded model must be as many on all."""
        order = np.argsort(column(examples, "length"), kind="stable").tolist()
        size, total, count = self.args.per_device_eval_batch_size, 0.0, 0
        for start in range(0, len(order), size):
            rows = [examples[index] for index in order[start : start + size]]
            batch = self._prepare_inputs(self.data_collator(rows))
            items = self._items(batch)
            with self.compute_loss_context_manager():
                total += self.compute_loss(self.model, batch).item() * items
            count += items
        return total / count

    def _items(self, batch: dict[str, torch.Tensor]) -> int:
        """What the loss of a batch is a mean over: its labelled tokens."""
        return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def patience_is_over(state: TrainerState, patience: int | None) -> bool:
    """Whether so many evaluations have brought no lower loss; from the state alone, which a resumed run has too."""
    if patience is None or not state.best_global_step:
        return False
    return state.global_step - state.best_global_step >= patience * state.eval_steps
