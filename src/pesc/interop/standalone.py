"""Our own two formats: a standalone folder with LoRA folded in, and the small adapter folder alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from pesc.crafting.adapter import ADAPTER_JSON, ADAPTER_WEIGHTS
from pesc.crafting.load import ModelRef
from pesc.interop.card import write_card
from pesc.interop.format import Format
from pesc.interop.places import public_name
from pesc.storage.files import copy_companions, read_json, write_json


def _write_standalone(ref: ModelRef, out: Path) -> None:
    if ref.kind == "adapter":
        ref.load(folded=True).save_pretrained(out)
    else:
        weights = ref.weights()
        for file in [ref.folder / "config.json", *ref.folder.glob("*.index.json"), *weights.files]:
            shutil.copyfile(file, out / file.name)
    copy_companions(ref.base.folder, out)
    write_card(out, ref)


def _write_adapter(ref: ModelRef, out: Path) -> None:
    shutil.copyfile(ref.folder / ADAPTER_WEIGHTS, out / ADAPTER_WEIGHTS)
    settings = read_json(ref.folder / ADAPTER_JSON)
    settings["base_model"] = public_name(settings["base_model"])
    write_json(out / ADAPTER_JSON, settings, sort_keys=True)


def _no_adapter(ref: ModelRef) -> list[str]:
    return [] if ref.kind == "adapter" else ["it is a standalone model: only a tuned run has an adapter"]


STANDALONE = Format(name="pesc", reasons_against=lambda ref: [], write=_write_standalone, needs_experts=False)
ADAPTER = Format(name="adapter", reasons_against=_no_adapter, write=_write_adapter, needs_experts=False)
