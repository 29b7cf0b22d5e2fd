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
    from pesc.crafting.craft import craft

__version__ = "0.1.0"
__all__ = ["PescConfig", "craft"]

_LAZY = {"craft": "pesc.crafting.craft"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pesc' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


register_when_transformers_loads()
