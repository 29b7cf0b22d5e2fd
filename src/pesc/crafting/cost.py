"""How many parameters a model has, how many a token meets, how many are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pesc.crafting.lora import adapter_tensors
from pesc.crafting.surgery import crafted_ffns, expert_parameters


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model with its LoRA folded in."""

    total: int
    """All parameters; tied ones once."""
    active: int
    """Those that take part in computing one token: all but the experts it is not sent to."""
    trained: int
    """LoRA, routers and experts: what training changes."""


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count a model's parameters; also works on the meta device.

    Args:
        model: dense or crafted, with or without LoRA. `trained` is 0 for a dense model without LoRA.
    """
    adapters = adapter_tensors(model)
    lora = set(adapters) - set(expert_parameters(model))
    total = sum(_size(parameter) for name, parameter in model.named_parameters() if name not in lora)
    idle = 0
    for _, ffn in crafted_ffns(model):
        bank = sum(_size(parameter) for parameter in ffn.experts.parameters())
        router = ffn.router
        idle += bank * (router.num_experts - router.num_experts_per_tok) // router.num_experts
    return ParameterCounts(total, total - idle, sum(_size(parameter) for parameter in adapters.values()))


def _size(parameter: nn.Parameter) -> int:
    # A 4-bit weight packs two parameters in a byte and remembers its shape.
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else shape.numel()
