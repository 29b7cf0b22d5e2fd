"""A run's health: numbers that are not finite, experts that get no tokens, weights that have not moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from pesc.config import LayerConfig
from pesc.crafting.adapter import adapter_weights
from pesc.crafting.surgery import crafted_ffns

WINDOW = 50
"""Optimizer steps over which the tokens of experts are counted: with 1,000 tokens a step, 2 of 8 experts chosen, an
even share is 12,500 tokens."""
DEAD = 0.01
"""Of an even share: an expert that gets less sees in 100 steps what it should see in one."""
COLLAPSED = 0.95
"""Of a layer's choices, for its K busiest experts. What is chosen more trains more, and is then chosen still more, so
that a router left to itself ends with the same few experts (Shazeer et al. 2017, section 4)."""


class NotFiniteError(ArithmeticError):
    """A loss or a gradient that ends a run, as a step with it would spoil every weight.

    Args:
        what: is not finite, with its value.
        step: the optimizer step in progress, counted from 1; the weights are those before it.
        examples: indices of the training examples that it was computed on.
    """

    def __init__(self, what: str, step: int, examples: list[int]) -> None:
        super().__init__(f"step {step}: {what}")
        self.step = step
        self.examples = examples


class FiniteSteps(Trainer):
    """Makes no optimizer step with a loss or a gradient that is not finite."""

    _micro_batches = 0
    """Of the step in progress, those that are done."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in the parent class.

        Raises:
            NotFiniteError: the loss is not.
        """
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise self._not_finite(f"the loss is {loss.item()}", self._micro_batches, 1)
        self._micro_batches += 1
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As in the parent class, which asks for it right before each optimizer step.

        Raises:
            NotFiniteError: the gradient's norm is not.
        """
        norm = super()._get_grad_norm(*args, **kwargs)
        if not torch.as_tensor(norm).isfinite():
            raise self._not_finite(f"the norm of the gradient is {float(norm)}", 0, self._micro_batches)
        self._micro_batches = 0
        return norm

    def _not_finite(self, what: str, first: int, count: int) -> NotFiniteError:
        done = round(self.state.epoch % 1 * len(self.callback_handler.train_dataloader))
        size = self.args.train_batch_size * self.accelerator.num_processes
        order = list(self._get_train_sampler())
        examples = order[(done + first) * size : (done + first + count) * size]
        return NotFiniteError(what, self.state.global_step + 1, examples)


def starved(counts: Sequence[torch.Tensor], layers: Mapping[int, LayerConfig]) -> dict[str, Any]:
    """What routing starves.

    Args:
        counts: how many tokens chose each expert, an [E] tensor for each crafted layer.
        layers: the layers' settings, in the same order, by the decoder layer's index.

    Returns:
        `collapsed_layers`, indices of the layers whose K busiest experts get nearly every token, and `dead_experts`,
        the experts of other layers that get next to none, by the layer's index as text.
    """
    collapsed, dead = [], {}
    for (index, layer), count in zip(layers.items(), counts, strict=True):
        if layer.num_experts == layer.num_experts_per_tok:  # no choice
            continue
        shares = count.double() / count.sum().clamp(min=1)
        if shares.topk(layer.num_experts_per_tok).values.sum() >= COLLAPSED:
            collapsed.append(index)
        elif experts := (shares < DEAD / layer.num_experts).nonzero().flatten().tolist():
            dead[str(index)] = experts
    return {"collapsed_layers": collapsed, "dead_experts": dead}


def starting_point(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies, on the CPU, of what tells whether a router or an expert moves; what is zero takes no memory.

    Returns:
        The weight of every router [E, D] and the second matrix of every bank [E, D, A], by name, in fp32.
    """
    with torch.no_grad():
        return {
            f"{name}.{part}": value.float().cpu().clone() if value.any() else torch.zeros(()).expand_as(value)
            for name, ffn in crafted_ffns(model)
            for part, value in (("router.weight", ffn.router.weight), ("experts.down_proj", ffn.experts.down_proj))
        }


def movement(start: Mapping[str, torch.Tensor], adapter: Path) -> dict[str, float | list[float]]:
    """How far routers and experts have moved.

    Args:
        start: as `starting_point` gives it.
        adapter: folder of the tuned model's adapter.

    Returns:
        By name: of a router the norm of the change over the norm at the start; of a bank the norm of the change of
        each expert's second matrix, which is zero in a new expert.
    """
    weights, moved = adapter_weights(adapter), {}
    for name, before in start.items():
        change, place = weights.read(name).float() - before, name.rpartition(".")[0]
        if place.endswith(".router"):
            moved[place] = (change.norm() / before.norm()).item()
        else:
            moved[place] = change.flatten(1).norm(dim=1).tolist()
    return moved


def tell_movement(moved: Mapping[str, float | list[float]]) -> str:
    """One line: that everything has moved, or what has not."""
    routers = {name: value for name, value in moved.items() if not isinstance(value, list)}
    banks = {name: values for name, values in moved.items() if isinstance(values, list)}
    experts = {f"{name}.{index}": value for name, values in banks.items() for index, value in enumerate(values)}
    still = [name for name, value in (routers | experts).items() if not value > 0]
    counted = f"{len(routers)} routers and {len(experts)} experts"
    if not still:
        return f"all {counted} have moved"
    named = ", ".join(still[:8]) + (", …" if len(still) > 8 else "")
    return f"of {counted}, {len(still)} have not moved, since no token has reached them: {named}"
