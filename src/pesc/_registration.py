"""Registers the model type "pesc" with transformers, without loading transformers.

Loading transformers' registry takes two seconds, mostly for torch; a command that only prints its help should not
wait for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.models.auto.configuration_auto"


def register_when_transformers_loads() -> None:
    """Register now if transformers' registry is loaded, else right after it will have been."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegistryFinder())


def _register() -> None:
    from pesc.crafting.model_config import register

    register()


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds transformers' registry as usual and adds one step after its execution; passes on everything else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
