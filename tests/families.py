"""Tiny random models of every family that crafting is tested on."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8}
_SLIDING = {"sliding_window": 8}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", _SLIDING),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", _HEAD),
    "gemma2": ("Gemma2", _HEAD | _SLIDING | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", _HEAD | _SLIDING | {"query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "smollm3": ("SmolLM3", {}),
    "starcoder2": ("Starcoder2", {"use_bias": True}),
    "gpt_neox": ("GPTNeoX", {"use_parallel_residual": True}),
    "cohere2": ("Cohere2", _SLIDING),
}
# Never named in the package: the surgery must find their FFNs by structure too.
UNTRIED: dict[str, tuple[str, dict]] = {
    "stablelm": ("StableLm", {}),
    "glm": ("Glm", _HEAD),
    "gpt2": ("GPT2", {}),
}


def dense_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The config of `tiny_model`, with changes."""
    name, settings = (FAMILIES | UNTRIED)[family]
    config_name = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
    return getattr(transformers, config_name)(**_SMALL | settings | changes)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random causal LM of a family, 3 layers of width 32, in eval mode."""
    name, _ = (FAMILIES | UNTRIED)[family]
    model_name = "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
    torch.manual_seed(seed)
    return getattr(transformers, model_name)(dense_config(family)).to(dtype).eval()


def disturb(model: PreTrainedModel, seed: int = 0, std: float = 0.3) -> PreTrainedModel:
    """Random values for all routers and experts, so that they matter."""
    from pesc.crafting.surgery import expert_parameters

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in expert_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def tokens(batch: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Random token ids of tiny models, none of them padding."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))
