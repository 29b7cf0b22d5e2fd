"""Other projects' tests, imported from their source archives. `make test-peers` unpacks these."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCES = Path(__file__).parents[2] / ".peers" / "sources"


def import_peer(project: str, module: str, **missing: dict[str, Any]) -> ModuleType:
    """Import a module of a project's tests, in the version that is installed.

    Args:
        project: the name on PyPI.
        module: the dotted name under its folder of tests.
        missing: what stands in for modules that the archive may leave out, by dotted name.

    A file of ours whose tests are in no archive is skipped.
    """
    folder = SOURCES / f"{project}-{version(project)}" / "tests"
    if not _file(folder, module).exists():
        pytest.skip(f"{folder} has no {module}", allow_module_level=True)
    package = f"{project}_tests"
    _add(package).__path__ = [str(folder)]
    for name, values in missing.items():
        if not _file(folder, name).exists():
            _add_missing(package, name, values)
    return importlib.import_module(f"{package}.{module}")


def _file(folder: Path, module: str) -> Path:
    return folder.joinpath(*module.split(".")).with_suffix(".py")


def _add(name: str) -> ModuleType:
    return sys.modules.setdefault(name, ModuleType(name))


def _add_missing(package: str, name: str, values: dict[str, Any]) -> None:
    for part in name.split("."):
        package = f"{package}.{part}"
        vars(_add(package)).update(__path__=[])
    vars(sys.modules[package]).update(values)
