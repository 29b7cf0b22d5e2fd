"""Tiny valid folders of every kind that is read, made once; each case damages a fresh copy at the same place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from checkpoints import tiny_dense, tiny_tokenizer, write_rows
from families import disturb
from pesc import PescConfig, add_lora, craft, save_adapter
from pesc.crafting.load import load
from pesc.crafting.lora import lora_parameters
from pesc.interop.formats import export
from pesc.machine.quiet import quiet_libraries
from published import CAMELIDAE, GATED, SPARSETRAL, Checkpoint

SMALL = {"num_experts": 4, "adapter_dim": 8}
SHARDED = {"max_shard_size": "30KB"}


def _crafted(place: Path, method: dict[str, str] | None = None, **save: str) -> None:
    model = disturb(craft(load(tiny_dense(place / "dense")), PescConfig(**SMALL, **(method or {}))))
    model.save_pretrained(place / "ours", **save)
    tiny_tokenizer().save_pretrained(place / "ours")
    shutil.rmtree(place / "dense")


def _exported(place: Path, format: str, name: str, method: dict[str, str] | None = None, **save: str) -> None:
    _crafted(place, method, **save)
    export(place / "ours", place / name, format)
    shutil.rmtree(place / "ours")


def _tuned(place: Path, adapter: str, pesc_config: PescConfig | None, **save: str) -> None:
    model = load(tiny_dense(place / "base", **save))
    if pesc_config:
        disturb(craft(model, pesc_config))
    add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in lora_parameters(model).items():
        torch.nn.init.normal_(parameter, std=0.1 if "lora_B" in name else 0.3)
    save_adapter(model, place / adapter)


def _run(place: Path) -> None:
    _tuned(place, "run/adapter", PescConfig(**SMALL, **GATED), **SHARDED)
    rows = write_rows(place / "rows.jsonl")
    recipe = f"model: {{name: {place / 'base'}}}\ndata: {{train: {rows}}}\noutput: {{folder: {place / 'run'}}}\n"
    (place / "run" / "recipe.yaml").write_text(recipe)


@dataclass(frozen=True)
class Kind:
    """A kind of folder: how to make it, and what of it the verbs are given."""

    make: Callable[[Path], object]
    model: str
    """Path of the model below the kind's place."""
    verbs: tuple[str, ...]
    hashed: bool = True
    """Whether hashes tell every change: in SHA256SUMS or, of an adapter's base, in adapter.json."""


_ADAPTER = ("verify", "load", "info", "export", "export_adapter", "chat")
_CRAFTED = ("verify", "load", "info", "export", "train", "chat")
_DENSE = ("verify", "load", "info", "craft", "train", "chat")
_PUBLISHED = ("verify", "load", "info", "import")
_STOCK = ("verify", "load", "info", "chat")

KINDS = {
    "dense": Kind(lambda p: tiny_dense(p / "model"), "model", _DENSE, hashed=False),
    "dense-sharded": Kind(lambda p: tiny_dense(p / "model", **SHARDED), "model", _DENSE, hashed=False),
    "crafted": Kind(lambda p: _exported(p, "pesc", "model"), "model", _CRAFTED),
    "crafted-sharded": Kind(lambda p: _exported(p, "pesc", "model", GATED, **SHARDED), "model", _CRAFTED),
    "adapter": Kind(lambda p: _tuned(p, "adapter", PescConfig(**SMALL)), "adapter", _ADAPTER),
    "lora": Kind(lambda p: _tuned(p, "adapter", None), "adapter", _ADAPTER),
    "run": Kind(_run, "run", _ADAPTER),
    "camelidae": Kind(lambda p: shutil.copytree(CAMELIDAE, p / "model"), "model", _PUBLISHED, hashed=False),
    "camelidae-bin": Kind(
        lambda p: Checkpoint().save(p / "model", shards=2, as_bin=True), "model", _PUBLISHED, hashed=False
    ),
    "sparsetral": Kind(lambda p: shutil.copytree(SPARSETRAL, p / "model"), "model", _PUBLISHED, hashed=False),
    "granitemoeshared": Kind(lambda p: _exported(p, "granitemoeshared", "model", GATED), "model", _STOCK),
    "qwen2_moe": Kind(lambda p: _exported(p, "qwen2_moe", "model", GATED), "model", _STOCK),
    "gguf": Kind(
        lambda p: _exported(p, "gguf-f32", "model.gguf", GATED), "model.gguf", ("verify", "load", "info"), hashed=False
    ),
}


class Folders:
    """The kinds' folders, below one root.

    Paths in files are absolute, so folders are made where cases will use them, and kept aside.
    """

    def __init__(self, root: Path, kinds: list[str]) -> None:
        self.work, self._kept = root / "work", root / "kept"
        for kind in kinds:
            (self.work / kind).mkdir(parents=True)
            torch.manual_seed(0)
            with quiet_libraries():
                KINDS[kind].make(self.work / kind)
            shutil.copytree(self.work / kind, self._kept / kind)

    def fresh(self, kind: str) -> Path:
        """The place of a kind, undamaged."""
        place = self.work / kind
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self._kept / kind, place, symlinks=True)
        return place
