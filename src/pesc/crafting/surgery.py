"""Find a model's FFNs by their structure and give them experts."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from pesc.config import PescConfig
from pesc.crafting.families import find_ffns
from pesc.method.moe import CraftedFFN, craft_ffn


def add_experts(model: PreTrainedModel, config: PescConfig) -> None:
    """Give the FFNs of a dense model their routers and experts, in place.

    Args:
        model: a dense causal LM whose `config` the banks will follow.
        config: the method's settings.

    Raises:
        ValueError: as `find_ffns` and `PescConfig.for_layers` do.
    """
    ffns = find_ffns(model)
    layers = config.for_layers(len(ffns))
    for index, (_, ffn) in enumerate(ffns):
        if index in layers:
            # The layer's own device; quantized weights have an integer dtype, unfit for adapters.
            device = next(ffn.parameters()).device
            crafted = craft_ffn(ffn, layers[index], model.config)
            crafted.router.to(device=device, dtype=model.dtype)
            crafted.experts.to(device=device, dtype=model.dtype)


def crafted_ffns(model: nn.Module) -> list[tuple[str, CraftedFFN]]:
    """(name, module) of every crafted FFN of a model, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CraftedFFN)]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that crafting added, by name: every router and every bank of experts."""
    return {
        f"{name}.{part}.{key}": parameter
        for name, ffn in crafted_ffns(model)
        for part in ("router", "experts")
        for key, parameter in ffn.get_submodule(part).named_parameters()
    }


def new_expert_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Freshly initialised values for `expert_parameters` of a model built on the meta device.

    Returns:
        CPU tensors by parameter name, in the parameters' dtype.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, ffn in crafted_ffns(model):
        for part in ("router", "experts"):
            module = ffn.get_submodule(part).to_empty(device="cpu")
            module.reset_parameters()  # type: ignore[operator]
            tensors |= {f"{name}.{part}.{key}": value.detach() for key, value in module.named_parameters()}
    return tensors
