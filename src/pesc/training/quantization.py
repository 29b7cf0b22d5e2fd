"""The base's linear layers in 4 or 8 bits while it is tuned (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

from transformers import BitsAndBytesConfig

from pesc.training.recipe import Recipe


def quantization_options(recipe: Recipe) -> dict[str, Any]:
    """What `ModelRef.load` is told: nothing, or how to quantize.

    Raises:
        ValueError: the recipe needs bitsandbytes, which is not installed.
    """
    kind, optim = recipe.model.quantization, recipe.training.optim
    needs = [f"model.quantization ({kind})"] if kind else []
    needs += [f"training.optim ({optim})"] if optim.endswith("bit") else []
    if needs and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{' and '.join(needs)} needs bitsandbytes: pip install 'pesc-moe[quantized]'")
    if kind is None:
        return {}
    four_bits = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": recipe.model.dtype,
    }
    return {"quantization_config": BitsAndBytesConfig(**four_bits if kind == "nf4" else {"load_in_8bit": True})}
