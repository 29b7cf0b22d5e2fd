"""The backbone of a crafted model: the one place at which the router's losses join the gradient."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import GradientState
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from pesc.crafting.surgery import crafted_ffns, expert_parameters
from pesc.method.extend import Extension
from pesc.method.losses import carry_loss, router_losses, token_mask
from pesc.method.routing import Routing, record_router_logits


class PescBackbone(Extension, PreTrainedModel):
    """Extends a dense backbone by the router's losses.

    In training, a backward pass through its output also adds the gradient of the router's losses, whatever loss a
    caller makes of that output. The output's values are the dense backbone's.
    """

    prefix = "Pesc"
    argument_names: tuple[str, ...]
    router_loss_scale: float | None = None
    """See `set_router_loss_scale`."""
    watchers: tuple[list[Routing], ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # transformers looks up by class what `output_hidden_states` and `output_attentions` may record.
        super().__init_subclass__(**kwargs)
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{type(self).__name__} gets its experts from a causal LM: build one and take its base_model")

    @classmethod
    def namespace(cls, dense: Any) -> dict[str, Any]:
        """The names of the dense forward's arguments."""
        return {"argument_names": argument_names(dense.forward)}

    @can_return_tuple
    def forward(self, *args: Any, output_router_logits: bool | None = None, **kwargs: Any) -> Any:
        """The dense forward; with `output_router_logits`, the output has `router_logits` as a causal LM's has.

        Raises:
            ValueError: in training, if the router's losses cannot reach the routers, or padding cannot be told.
        """
        trains = self.training and torch.is_grad_enabled()
        if not (trains or output_router_logits or self.watchers):
            return super().forward(*args, return_dict=True, **kwargs)
        with record_router_logits(self) as router_logits:
            outputs = super().forward(*args, return_dict=True, **kwargs)
        routing = self._routing(router_logits, argument("attention_mask", self.argument_names, args, kwargs))
        for watcher in self.watchers:
            watcher.append(routing)
        if trains:
            _warn_of_frozen_experts(self)
            _replace_hidden_states(outputs, carry_loss(outputs.last_hidden_state, routing.loss, self.loss_scale()))
        if output_router_logits:
            outputs["router_logits"] = tuple(logits.detach() for logits in router_logits)
        return outputs

    def loss_scale(self) -> float:
        """What the gradient of a pass's router losses is multiplied by."""
        # In accelerate's loops `accelerator.backward` divides a loss by these steps; they are 1 in all others.
        return 1 / GradientState().num_steps if self.router_loss_scale is None else self.router_loss_scale

    def _routing(self, router_logits: list[torch.Tensor], attention_mask: Any) -> Routing:
        pesc_config, routers = self.config.pesc_config, [ffn.router for _, ffn in crafted_ffns(self)]
        _refuse_routers_cut_off(routers, router_logits)
        top_k = [router.num_experts_per_tok for router in routers]
        mask = token_mask(attention_mask, router_logits[0].shape[0])
        balance, z = router_losses(router_logits=router_logits, num_experts_per_tok=top_k, mask=mask)
        loss = pesc_config.router_aux_loss_coef * balance + pesc_config.router_z_loss_coef * z
        return Routing(router_logits, top_k, mask, balance, loss)


def set_router_loss_scale(model: nn.Module, scale: float | None) -> None:
    """Say what the gradient of each forward pass's router losses is multiplied by.

    A loop needs it if it makes a loss of its own from the logits and scales that loss: with 4 micro-batches a step,
    `set_router_loss_scale(model, 1 / 4)`. For transformers trainers, trl's among them, `import pesc` does it.

    Args:
        model: a crafted model, or a wrapper around it.
        scale: None for the default: 1, or 1 / gradient_accumulation_steps of accelerate's `Accelerator`.
    """
    for backbone in _backbones(model):
        backbone.router_loss_scale = scale


@contextmanager
def watch_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect the `Routing` of a model's forward passes inside the block: of none for a dense model."""
    seen: list[Routing] = []
    backbones = _backbones(model)
    for backbone in backbones:
        backbone.watchers = (*backbone.watchers, seen)
    try:
        yield seen
    finally:
        for backbone in backbones:
            backbone.watchers = backbone.watchers[:-1]


def argument_names(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's arguments, in order, without `self`."""
    return tuple(inspect.signature(method).parameters)[1:]


def argument(name: str, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An argument of a call, whether it was given by position or by name; None if it was left out."""
    return args[names.index(name)] if name in names[: len(args)] else kwargs.get(name)


def _backbones(model: nn.Module) -> list[PescBackbone]:
    return [module for module in model.modules() if isinstance(module, PescBackbone)]


def _replace_hidden_states(outputs: Any, hidden_states: torch.Tensor) -> None:
    last = outputs.last_hidden_state
    outputs.last_hidden_state = hidden_states
    if outputs.get("hidden_states") is not None:
        outputs.hidden_states = tuple(hidden_states if state is last else state for state in outputs.hidden_states)


def _warn_of_frozen_experts(backbone: PescBackbone) -> None:
    if not any(parameter.requires_grad for parameter in expert_parameters(backbone).values()):
        warnings.warn(
            "routers and experts are frozen and do not train: peft freezes them unless its LoraConfig has "
            'modules_to_save=["router", "experts"]; pesc.add_lora trains them beside LoRA',
            stacklevel=2,
        )


def _refuse_routers_cut_off(routers: Sequence[Any], router_logits: Sequence[torch.Tensor]) -> None:
    if len(router_logits) != len(routers):
        raise ValueError(
            f"{len(router_logits)} of {len(routers)} routers ran: another library has replaced the forward of FFNs "
            "(liger's swiglu does), and their experts are left out; switch that off"
        )
    trained = (router.weight.requires_grad and torch.is_grad_enabled() for router in routers)
    if any(wanted and not logits.requires_grad for wanted, logits in zip(trained, router_logits, strict=True)):
        raise ValueError(
            "gradient checkpointing with use_reentrant=True cuts the router's losses off from the router: use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
