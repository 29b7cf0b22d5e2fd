"""What a model on disk is, read from its files without loading its dense weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pesc.config import PescConfig
from pesc.crafting.adapter import ADAPTER_WEIGHTS, read_settings
from pesc.crafting.cost import count_parameters
from pesc.crafting.craft import craft
from pesc.crafting.load import find_adapter, load_config
from pesc.crafting.sources import resolve
from pesc.crafting.surgery import crafted_ffns, expert_parameters
from pesc.storage.weights import read_weight_map, tensor_names


@dataclass
class ModelInfo:
    """A model's description."""

    path: str
    kind: str
    """"dense", "crafted" or "adapter"."""
    family: str
    """The dense model_type."""
    base_model: str | None
    """An adapter's base."""
    num_layers: int
    hidden_size: int
    dtype: str
    parameters: dict[str, int]
    """total, active, trained."""
    file_bytes: int
    """Size of the weight files."""
    pesc: dict[str, Any] | None = None
    """The method's settings, where there are experts."""
    lora: dict[str, Any] | None = None
    crafted_layers: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Router and expert tensors that the settings promise and the files lack."""
    wrong_shape: list[str] = field(default_factory=list)
    """Router and expert tensors of another shape than the settings promise."""
    untouched: list[str] = field(default_factory=list)
    """Experts still at their initial value: they add nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe(path: str | Path) -> ModelInfo:
    """Describe a model by the same paths that `pesc.load` takes.

    Raises:
        FileNotFoundError, ValueError: for a path that is no model, or whose files are damaged.
    """
    folder = find_adapter(path)
    return _describe_model(path) if folder is None else _describe_adapter(path, folder)


def _describe_model(path: str | Path) -> ModelInfo:
    config = load_config(path)
    source = resolve(path)
    weight_map = read_weight_map(source)
    for file in sorted(set(weight_map.values())):
        tensor_names(source / file)
    files = {name: source / file for name, file in weight_map.items()}
    return _info(path, "crafted" if config.model_type == "pesc" else "dense", _skeleton(config), files)


def _describe_adapter(path: str | Path, folder: Path) -> ModelInfo:
    settings = read_settings(folder)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no {ADAPTER_WEIGHTS}: the folder is not whole")
    model = _skeleton(load_config(settings["base_model"]))
    if settings["pesc"] and not crafted_ffns(model):
        craft(model, PescConfig.from_dict(settings["pesc"]))
    names = tensor_names(weights)
    info = _info(path, "adapter", model, dict.fromkeys(names, weights))
    with safe_open(weights, "pt") as tensors:
        info.parameters["trained"] = sum(_numel(tensors.get_slice(name).get_shape()) for name in names)
    info.base_model, info.lora = settings["base_model"], settings["lora"]
    return info


def _info(path: str | Path, kind: str, model: Any, files: dict[str, Path]) -> ModelInfo:
    config, ffns = model.config, crafted_ffns(model)
    promised = {name: list(parameter.shape) for name, parameter in expert_parameters(model).items()}
    method = config.method if ffns else None
    return ModelInfo(
        path=str(path),
        kind=kind,
        family=getattr(config, "base_model_type", None) or config.model_type,
        base_model=None,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        parameters=asdict(count_parameters(model)),
        file_bytes=sum(file.stat().st_size for file in set(files.values())),
        pesc=method.to_dict() if method else None,
        crafted_layers=sorted(method.for_layers(config.num_hidden_layers)) if method else [],
        missing=[name for name in promised if name not in files],
        wrong_shape=[name for name, shape in promised.items() if name in files and _shape(files[name], name) != shape],
        untouched=_untouched(promised, files),
    )


def _untouched(promised: Iterable[str], files: dict[str, Path]) -> list[str]:
    found = []
    for name in promised:
        if name.endswith("experts.down_proj") and name in files:
            with safe_open(files[name], "pt") as tensors:
                zero = ~tensors.get_tensor(name).flatten(1).any(dim=1)
            found += [f"{name.removesuffix('.down_proj')}.{expert}" for expert in zero.nonzero().flatten().tolist()]
    return found


def _shape(file: Path, name: str) -> list[int]:
    with safe_open(file, "pt") as tensors:
        return tensors.get_slice(name).get_shape()


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _numel(shape: list[int]) -> int:
    return torch.Size(shape).numel()
