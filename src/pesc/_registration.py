"""Registers with transformers what crafted models need, without loading transformers.

Loading transformers' registry takes two seconds, mostly for torch; a command that only prints its help should not
wait for it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# A module of transformers, and the module of ours whose `register` runs right after it has loaded.
_AFTER = {
    "transformers.models.auto.configuration_auto": "pesc.crafting.configuration",
    "transformers.trainer": "pesc.training.router_loss",
}


def register_when_transformers_loads() -> None:
    """Register now what transformers has loaded a home for, and the rest right after that home loads."""
    for name in _AFTER:
        if name in sys.modules:
            _register(name)
    sys.meta_path.insert(0, _Finder())


def _register(name: str) -> None:
    importlib.import_module(_AFTER[name]).register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds those modules as usual and adds a step after their execution; passes on everything else."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _AFTER or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader, fullname)
        return spec


def _register_after(loader: Any, name: str) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register(name)

    loader.exec_module = exec_module
