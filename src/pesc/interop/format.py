"""A format: the models that it can hold, its writer and its reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pesc.crafting.load import ModelRef
from pesc.storage.weights import Weights


@dataclass(frozen=True)
class Source:
    """A model opened for export, LoRA folded in."""

    ref: ModelRef
    names: list[str]
    """Its tensors by their names in transformers; tied ones once."""
    read: Callable[[str], torch.Tensor]
    """One tensor by name."""

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.ref.config

    @property
    def folder(self) -> Path:
        """The folder of the tokenizer, the licence and the like."""
        return self.ref.base.folder


def open_source(ref: ModelRef) -> Source:
    """Open a complete model for export: an adapter is loaded and folded, other weights are read one at a time."""
    names = [name for name, _ in ref.skeleton().named_parameters()]
    if ref.kind == "adapter":
        folded = dict(ref.load(folded=True).named_parameters())
        return Source(ref, names, lambda name: folded[name].detach())
    return Source(ref, names, ref.weights().read)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a format comes in."""

    recognises: Callable[[dict[str, Any], Iterable[str]], bool]
    """Whether a config and tensor names are of the format."""
    read: Callable[[Path, dict[str, Any], Weights, Path], None]
    """Write a crafted folder from a folder of the format, its config and its weights; the last folder is there."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table in formats.py."""

    name: str
    reasons_against: Callable[[ModelRef], list[str]]
    """Why the format cannot hold a model, a reason each, told before any weight is read; empty if it can."""
    write: Callable[[ModelRef, Path], None]
    """Write a model that nothing speaks against into a folder that is there, or as a file that is not."""
    suffix: str = ""
    """Of a format that is one file: ".gguf"."""
    reader: Reader | None = None
    needs_experts: bool = True
    """Whether the format is for crafted models alone."""
