"""What is done with a folder: the verbs of the command, through the functions that the command calls.

Each returns the logits of the model that came of it, if one did, and raises what the verb raises.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from checkpoints import write_rows
from pesc.crafting.craft_checkpoint import craft_checkpoint
from pesc.crafting.info import describe
from pesc.crafting.load import locate
from pesc.crafting.show import show_info
from pesc.interop.formats import export, import_checkpoint
from pesc.interop.verify.show import show_report
from pesc.interop.verify.verify import verify
from pesc.machine.quiet import quiet_libraries
from pesc.serving.chat import open_chat
from pesc.training.recipe import load_recipe
from pesc.training.train import train

IDS = torch.arange(3, 14).unsqueeze(0)


def _logits(model: Any) -> list[float]:
    with torch.no_grad():
        return model(IDS).logits[0, -1].float().tolist()


def _verify(_: Path, model: Path) -> list[float]:
    report = verify(model)
    show_report(report, Console(file=io.StringIO()))
    if not report.complete:
        raise ValueError("; ".join(finding.message for finding in report.findings if finding.severity == "error"))
    return []


def _load(_: Path, model: Path, base: Path | None = None) -> list[float]:
    ref = locate(model, base=base)
    # grouped_mm, the default, takes only widths whose rows are a multiple of 16 bytes.
    stock = {"experts_implementation": "eager"} if "moe" in str(model.parent) else {}
    with quiet_libraries():
        return _logits(ref.load(folded=True, **stock))


def _info(_: Path, model: Path) -> list[float]:
    show_info(describe(model), Console(file=io.StringIO()))
    return []


def _craft(place: Path, model: Path) -> list[float]:
    from pesc import PescConfig

    return _load(place, craft_checkpoint(model, place / "crafted", PescConfig(num_experts=2, adapter_dim=4)))


def _import(place: Path, model: Path) -> list[float]:
    return _load(place, import_checkpoint(model, place / "imported"))


def _export(place: Path, model: Path, format: str = "pesc") -> list[float]:
    with quiet_libraries():
        # An exported adapter does not say where its base lies on this machine.
        return _load(place, export(model, place / f"as-{format}", format), place / "base")


def _train(place: Path, model: Path) -> list[float]:
    rows, recipe = write_rows(place / "few.jsonl", 4), place / "recipe.yaml"
    lines = [f"model: {{name: {model}}}", f"data: {{train: {rows}}}", "lora: {r: 2}", "pesc: null"]
    lines += [f"output: {{folder: {place / 'tuned'}}}", "training: {steps: 2, batch_size: 2}"]
    recipe.write_text("\n".join(lines))
    train(load_recipe(recipe, []), Console(file=io.StringIO()))
    return []


def _chat(_: Path, model: Path) -> list[float]:
    chat = open_chat(model, Console(file=io.StringIO()), max_new_tokens=2)
    with quiet_libraries():
        chat.answer("hello")
    return _logits(chat.model)


VERBS: dict[str, Callable[[Path, Path], list[float]]] = {
    "verify": _verify,
    "load": _load,
    "info": _info,
    "craft": _craft,
    "import": _import,
    "export": _export,
    "export_adapter": lambda place, model: _export(place, model, "adapter"),
    "train": _train,
    "chat": _chat,
}
