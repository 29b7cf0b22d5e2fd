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
from typing import Any

_REGISTRY = "transformers.models.auto.configuration_auto"


def register_when_transformers_loads() -> None:
    """Register now if transformers' registry is loaded, else right after it will have been."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegistryFinder())


def _register() -> None:
    from pesc.crafting.configuration import register

    register()


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds transformers' registry as usual and adds a step after its execution; passes on everything else."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader)
        return spec


def _register_after(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register()

    loader.exec_module = exec_module
