"""Craft a dense model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from pesc.config import PescConfig
from pesc.crafting.backbone import PescBackbone
from pesc.crafting.configuration import crafted_config
from pesc.crafting.families import find_ffns, refuse_moe
from pesc.crafting.modeling import PescForCausalLM
from pesc.crafting.surgery import add_experts
from pesc.method.extend import extend_class


def craft(dense_model: PreTrainedModel, config: PescConfig | None = None) -> PreTrainedModel:
    """Turn a dense causal LM into a Mixture of Experts that computes exactly the same, until it is tuned.

    The model is changed in place, so its weights are never copied: the argument itself becomes the crafted model.

    Args:
        dense_model: a transformers causal LM of any family, on any device or devices, quantized or not.
        config: the method's settings; the paper's by default.

    Returns:
        The same object, now also a `PescForCausalLM`. Routers and adapters lie beside their FFN, in the model's dtype.

    Raises:
        ValueError: for a model that is no dense causal LM of transformers, or whose FFNs cannot be found; it is left
            as it was.
    """
    config = config or PescConfig()
    _refuse_what_cannot_be_crafted(dense_model, config)
    dense_config = dense_model.config
    new_config = crafted_config(dense_config, config)
    with _without_device_hooks(dense_model):
        add_experts(dense_model, config)
        for module in dense_model.modules():
            for holder in (module, *vars(module).values()):
                if getattr(holder, "config", None) is dense_config:
                    holder.config = new_config
        extend_class(dense_model.base_model, PescBackbone)
        extend_class(dense_model, PescForCausalLM)
    # peft writes this down as an adapter's base, and later loads the base from there.
    dense_model.name_or_path = "crafted in memory, saved nowhere: pass the model itself"
    new_config._experts_implementation = dense_model.get_correct_experts_implementation(None)
    return dense_model


def _refuse_what_cannot_be_crafted(model: Any, config: PescConfig) -> None:
    refuse_moe(model.config)
    if type(model) is not MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None):
        raise ValueError(
            f"craft needs a causal LM of transformers, such as AutoModelForCausalLM loads; got {type(model).__name__}"
        )
    ffns = find_ffns(model)
    config.for_layers(len(ffns))
    offloaded = [name for name, ffn in ffns if any(p.is_meta for p in ffn.parameters())]
    if offloaded and not all(p.is_meta for p in model.parameters()):
        raise ValueError(f"{offloaded[0]} is offloaded: craft the checkpoint (pesc craft) and load that instead")


@contextmanager
def _without_device_hooks(model: Any) -> Iterator[None]:
    # accelerate moves tensors between devices from a forward that it puts on each module, in front of its class.
    hooks = [(module, module._hf_hook) for module in model.modules() if hasattr(module, "_hf_hook")]
    if not hooks:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    for module, _ in hooks:
        remove_hook_from_module(module)
        vars(module).pop("forward", None)
    try:
        yield
    finally:
        for module, hook in hooks:
            add_hook_to_module(module, hook)
