"""Our own two formats: a standalone folder with LoRA folded in, and the small adapter folder alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from pesc.crafting.load import RECIPE, ModelRef
from pesc.interop.card import write_card
from pesc.interop.format import Format
from pesc.report.results import RESULTS
from pesc.storage.files import copy_companions


def _write_standalone(ref: ModelRef, out: Path) -> None:
    if ref.kind == "adapter":
        ref.load(folded=True).save_pretrained(out)
    else:
        weights = ref.complete_weights()
        for file in [ref.folder / "config.json", *ref.folder.glob("*.index.json"), *weights.files]:
            shutil.copyfile(file, out / file.name)
    copy_companions(ref.base.folder, out)
    for name in (RECIPE, RESULTS):
        if ref.run and (ref.run / name).is_file():
            shutil.copyfile(ref.run / name, out / name)
    write_card(out, ref)


def _write_adapter(ref: ModelRef, out: Path) -> None:
    for file in ref.folder.iterdir():
        if file.is_file():
            shutil.copyfile(file, out / file.name)


def _no_adapter(ref: ModelRef) -> list[str]:
    return [] if ref.kind == "adapter" else ["it is a standalone model: only a tuned run has an adapter"]


STANDALONE = Format(name="pesc", reasons_against=lambda ref: [], write=_write_standalone, needs_experts=False)
ADAPTER = Format(name="adapter", reasons_against=_no_adapter, write=_write_adapter, needs_experts=False)
