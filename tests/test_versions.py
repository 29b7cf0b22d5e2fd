"""docs/extend/versions.md lists what we use of other libraries without their promise; the list is complete and true."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extend/versions.md").read_text()
SOURCE = {path: path.read_text() for path in (ROOT / "src/pesc").rglob("*.py")}
ROWS = re.findall(r"^\| `([\w.]+)` \| (.*?) \| `([\w/.]+)::(\w+)` \|$", PAGE, re.MULTILINE)
LISTED = {(module, name) for module, names, *_ in ROWS for name in re.findall(r"`(\w+)`", names)}
PRIVATE = re.compile("_[^_]")


@pytest.mark.parametrize(("module", "name"), sorted(LISTED))
def test_what_is_listed_is_there_and_used(module: str, name: str) -> None:
    assert any(re.search(rf"\b{name}\b", text) for text in SOURCE.values())
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    loaded = importlib.import_module(module)
    assert hasattr(loaded, name) or re.search(rf"\b{name}\b", inspect.getsource(loaded))


@pytest.mark.parametrize(("path", "test"), sorted({row[2:] for row in ROWS}))
def test_the_test_of_a_row_exists(path: str, test: str) -> None:
    assert f"def {test}(" in (ROOT / path).read_text()


def test_what_is_used_is_listed() -> None:
    nodes = [node for text in SOURCE.values() for node in ast.walk(ast.parse(text))]
    imported = {found for node in nodes for found in _imported(node)}
    assert imported <= LISTED
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    own = {name for node in nodes for name in _defined(node)}
    overrides = {name for name in own - used if name in _methods(nodes)}
    private = {name for name in (used - own) | overrides if PRIVATE.match(name)}
    assert private <= {name for _, name in LISTED}


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Names from within these libraries, not from their front door."""
    if isinstance(node, ast.ImportFrom) and node.module:
        library, _, inner = node.module.partition(".")
        if library in ("transformers", "trl", "peft", "accelerate", "gguf", "vllm"):
            yield from ((node.module, alias.name) for alias in node.names if inner or PRIVATE.match(alias.name))


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
        yield node.attr


def _methods(nodes: list[ast.AST]) -> set[str]:
    return {name for node in nodes if isinstance(node, ast.ClassDef) for part in node.body for name in _defined(part)}
