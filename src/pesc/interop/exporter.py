"""Export a model of ours: standalone, as a small adapter, or in a format that other programs load.

What a format cannot express is refused before any weight is loaded, with the reason and the nearest format that can.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pesc.config import PescConfig
from pesc.crafting.adapter import ADAPTER_JSON
from pesc.crafting.configuration import MODEL_TYPE, crafted_config
from pesc.crafting.load import base_of, find_adapter, load, load_config
from pesc.crafting.lora import fold
from pesc.crafting.skeleton import skeleton_of
from pesc.crafting.sources import resolve
from pesc.interop.card import RECIPE, RESULTS, write_card
from pesc.interop.gguf.exporter import export_gguf, gguf_reasons
from pesc.interop.limits import TARGETS, Source, reasons_against
from pesc.interop.published.exporter import export_layout, layout_reasons
from pesc.interop.stock import DEFAULT_FORMAT, export_stock
from pesc.storage.files import copy_companions, new_folder, read_json
from pesc.storage.weights import Weights, read_weight_map

_GGUF = {"gguf-f32": "F32", "gguf-f16": "F16", "gguf-q8_0": "Q8_0"}
_LAYOUTS = ("camelidae", "sparsetral")
FORMATS = ("pesc", "adapter", "stock", *TARGETS, *_GGUF, *_LAYOUTS)
"""What `export` writes; "stock" is the stock architecture that suits the model's base best."""


@dataclass(frozen=True)
class _Model:
    """A model on disk, known by its configs alone."""

    path: str
    config: Any
    """Of the model as it will be: crafted, where there are experts."""
    adapter: Path | None
    """Its adapter folder, where it is one or a run."""
    folder: Path
    """Where its dense weights and its tokenizer lie."""

    @property
    def crafted(self) -> bool:
        return self.config.model_type == MODEL_TYPE

    @property
    def run(self) -> Path | None:
        """The run's folder, which holds the recipe."""
        for place in (Path(self.path).expanduser(), Path(self.path).expanduser().parent):
            if self.adapter and (place / RECIPE).is_file() and find_adapter(place) == find_adapter(self.path):
                return place
        return None


def export(model: str | Path, out: Path, format: str) -> Path:
    """Write a model in another format; LoRA is folded into the weights, but for "adapter".

    Args:
        model: what `pesc.load` takes: a run, an adapter or a crafted folder, or a hub id of one.
        out: a folder that does not exist yet; for GGUF a file, ending in .gguf.
        format: one of `FORMATS`.

    Returns:
        `out`.

    Raises:
        FileExistsError: when `out` is there already.
        FileNotFoundError: when the model, its base, or a package that the format needs is not there.
        ValueError: for an unknown format; for a model that the format cannot express, with each reason and the
            nearest format that can; and for one that is not whole.
    """
    if format not in FORMATS:
        raise ValueError(f"format ({format!r}) must be one of {', '.join(FORMATS)}")
    out = Path(out)
    if format in _GGUF and out.suffix != ".gguf":
        raise ValueError(f"out ({out}) must be a file that ends in .gguf, such as {out.name}.gguf")
    opened = _open(model)
    if format == "stock":
        format = DEFAULT_FORMAT.get(getattr(opened.config, "base_model_type", ""), "granitemoeshared")
    if reasons := _reasons(opened, format):
        raise ValueError(f"{format} cannot hold {model}: {'; '.join(reasons)}. {_way_out(opened, format)}")
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another name, or remove it first")
    if format in TARGETS:
        return export_stock(_source(opened), out, format)
    if format in _GGUF:
        return export_gguf(_source(opened), out, _GGUF[format])  # type: ignore[arg-type]
    if format in _LAYOUTS:
        return _export_layout(opened, out, format)  # type: ignore[arg-type]
    return _export_adapter(opened, out) if format == "adapter" else _export_standalone(opened, out)


def _open(model: str | Path) -> _Model:
    adapter = find_adapter(model)
    if adapter is None:
        return _Model(str(model), load_config(model), None, resolve(model))
    settings = read_json(adapter / ADAPTER_JSON)
    base = settings["base_model"]
    config = load_config(base)
    if settings["pesc"] and config.model_type != MODEL_TYPE:
        config = crafted_config(config, PescConfig.from_dict(settings["pesc"]))
    return _Model(str(model), config, adapter, resolve(base))


def _reasons(model: _Model, format: str) -> list[str]:
    if format == "adapter":
        return [] if model.adapter else ["it is a standalone model: only a tuned run has an adapter"]
    if not model.crafted:
        return [] if format == "pesc" and model.adapter else [_dense_reason(model)]
    if format in TARGETS:
        return reasons_against(model.config, TARGETS[format])
    if format in _GGUF:
        return gguf_reasons(model.config, model.folder)
    return layout_reasons(model.config, format) if format in _LAYOUTS else []


def _dense_reason(model: _Model) -> str:
    tuned = ", tuned with LoRA alone" if model.adapter else ""
    return f"it has no experts: it is a dense {model.config.model_type} model{tuned}"


def _way_out(model: _Model, format: str) -> str:
    if not model.crafted:
        folded = "use --format pesc, which folds LoRA into an ordinary dense folder"
        return folded.capitalize() if model.adapter else "Its folder is what other programs load already"
    if format == "adapter":
        return "Use --format pesc"
    if format in _LAYOUTS:
        return "Each reason names its way out"
    for other in (*TARGETS, "gguf-f32"):
        if not _reasons(model, other):
            return f"The nearest that can: --format {other}"
    return "The nearest that can: --format pesc, which vLLM serves with this package's plugin"


def _source(model: _Model) -> Source:
    names = [name for name, _ in skeleton_of(model.config).named_parameters()]
    if model.adapter:
        folded = dict(fold(load(model.path)).named_parameters())
        return Source(model.path, model.config, names, lambda name: folded[name].detach(), model.folder)
    weights = Weights(model.folder)
    _check_whole(model, weights)
    return Source(model.path, model.config, names, weights.read, model.folder)


def _check_whole(model: _Model, weights: Weights) -> None:
    lines = []
    for name, parameter in skeleton_of(model.config).named_parameters():
        found = weights.tensors.get(name)
        if found is None:
            lines.append(f"  missing: {name}")
        elif found.shape != tuple(parameter.shape):
            shapes = f"{list(found.shape)} in the file, {list(parameter.shape)} by the config"
            lines.append(f"  wrong shape: {name} is {shapes}")
    if lines:
        raise ValueError(f"{model.path} does not hold the model its config describes:\n" + "\n".join(lines))


def _export_layout(model: _Model, out: Path, layout: Literal["camelidae", "sparsetral"]) -> Path:
    if not model.adapter:
        return export_layout(model.folder, out, layout)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folded:
        fold(load(model.path)).save_pretrained(folded)
        copy_companions(model.folder, Path(folded))
        return export_layout(folded, out, layout)


def _export_adapter(model: _Model, out: Path) -> Path:
    assert model.adapter is not None
    with new_folder(out) as partial:
        for file in sorted(model.adapter.iterdir()):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
    return out


def _export_standalone(model: _Model, out: Path) -> Path:
    with new_folder(out) as partial:
        if model.adapter:
            fold(load(model.path)).save_pretrained(partial)
        else:
            _check_whole(model, Weights(model.folder))
            for name in {"config.json", *read_weight_map(model.folder).values()}:
                shutil.copyfile(model.folder / name, partial / name)
            if (index := model.folder / "model.safetensors.index.json").is_file():
                shutil.copyfile(index, partial / index.name)
        copy_companions(model.folder, partial)
        for name in (RECIPE, RESULTS):
            if model.run and (model.run / name).is_file():
                shutil.copyfile(model.run / name, partial / name)
        base = base_of(model.path) if model.adapter else ""
        write_card(partial, name=out.name, base=base, base_folder=model.folder, config=model.config, run=model.run)
    return out
