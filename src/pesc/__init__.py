"""PESC: turn a dense language model into a Mixture of Experts while instruction-tuning it.

Importing `pesc` is enough for transformers' Auto classes to load crafted models. It costs nothing until transformers
is used: the model type is registered at the moment transformers' own registry is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pesc._registration import register_when_transformers_loads
from pesc.config import PescConfig

if TYPE_CHECKING:
    from pesc.crafting.adapter import save_adapter
    from pesc.crafting.backbone import set_router_loss_scale
    from pesc.crafting.craft import craft
    from pesc.crafting.craft_checkpoint import craft_checkpoint
    from pesc.crafting.load import load, load_tokenizer
    from pesc.crafting.lora import add_lora, fold
    from pesc.training.recipe import Recipe
    from pesc.training.train import train

__version__ = "0.1.0"
__all__ = [
    "PescConfig",
    "Recipe",
    "add_lora",
    "craft",
    "craft_checkpoint",
    "fold",
    "load",
    "load_tokenizer",
    "save_adapter",
    "set_router_loss_scale",
    "train",
]

# Loaded when first used: torch and transformers take seconds.
_HOMES = {
    "Recipe": "pesc.training.recipe",
    "add_lora": "pesc.crafting.lora",
    "craft": "pesc.crafting.craft",
    "craft_checkpoint": "pesc.crafting.craft_checkpoint",
    "fold": "pesc.crafting.lora",
    "load": "pesc.crafting.load",
    "load_tokenizer": "pesc.crafting.load",
    "save_adapter": "pesc.crafting.adapter",
    "set_router_loss_scale": "pesc.crafting.backbone",
    "train": "pesc.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pesc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


register_when_transformers_loads()
