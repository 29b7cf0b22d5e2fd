"""LoRA beside experts: which parameters train, and merging into the dense weights."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from pesc.crafting.surgery import expert_parameters

LORA_NAME = "default"
_LEAVES_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """Give a model LoRA and say what trains: LoRA, routers and experts; all else is frozen.

    What trains is kept in float32, whatever the model's dtype: its steps are too small for less.

    Args:
        model: dense or crafted; changed in place.
        lora: peft's settings.

    Returns:
        The same model.

    Raises:
        ValueError: for settings that train more than LoRA, or LoRA on tied embeddings, which cannot be folded.
    """
    refuse_unsavable(lora, LORA_NAME)
    model.add_adapter(lora, adapter_name=LORA_NAME)
    tied = model.config.tie_word_embeddings and isinstance(model.get_input_embeddings(), LoraLayer)
    if tied or isinstance(model.get_output_embeddings(), LoraLayer):
        raise ValueError("add_lora: target_modules must not name the embeddings or the output layer")
    train_experts(model)
    return model


def refuse_unsavable(lora: PeftConfig, name: str | None) -> None:
    """Refuse an adapter that an adapter folder cannot hold: it holds LoRA, routers and experts.

    Args:
        lora: peft's settings.
        name: peft's name for it; None for "default".

    Raises:
        ValueError: with all reasons.
    """
    problems = [] if name in (None, LORA_NAME) else [f"its name ({name!r}) must be {LORA_NAME!r}"]
    if isinstance(lora, LoraConfig):
        others = ("modules_to_save", "trainable_token_indices", "layer_replication")
        problems += [f"{other} must be left out" for other in others if getattr(lora, other)]
        if lora.bias != "none":
            problems.append(f"bias ({lora.bias!r}) must be 'none'")
        if lora.init_lora_weights not in _LEAVES_THE_BASE:
            problems.append(f"init_lora_weights ({lora.init_lora_weights!r}) changes the base's weights")
    else:
        problems.append(f"{type(lora).__name__} must be a LoraConfig")
    if problems:
        raise ValueError(f"no adapter folder can hold this adapter: {'; '.join(problems)}")


def train_experts(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Let routers and experts train, and beside them only what LoRA added.

    Args:
        model: changed in place.
        dtype: what they are kept in, and with them the optimizer's moments. Routers and experts compute in the dtype of
            the activations. A step in bfloat16 is lost where it is below 1/256 of a weight.
    """
    trained = adapter_tensors(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in trained:
            parameter.data = parameter.data.to(dtype)


def cast_experts(model: PreTrainedModel) -> None:
    """Bring routers and experts to the model's dtype, in which they compute also while they train in another."""
    for parameter in expert_parameters(model).values():
        parameter.data = parameter.data.to(model.dtype)


def adapter_tensors(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What an adapter folder holds of a model: LoRA, router and expert parameters by name."""
    return expert_parameters(model) | lora_parameters(model)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What LoRA added to a model, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for key, parameter in module.named_parameters()
        if not key.startswith("base_layer.")
    }


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """Merge LoRA into the dense weights, so that `save_pretrained` writes a standalone model.

    Experts cannot be merged: different tokens use different ones.

    Args:
        model: changed in place; without LoRA it is returned as it is.

    Returns:
        The same model, computing the same.

    Raises:
        ValueError: the dense weights are quantized, or LoRA holds values that are not finite.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("fold: quantized weights would round LoRA away: load the model without quantization_config")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    cast_experts(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
        del model.peft_config
        # The folded model is the base of whatever is tuned next, and it is saved nowhere yet.
        vars(model).pop("adapter_base", None)
        model.config.name_or_path = ""
    return model
