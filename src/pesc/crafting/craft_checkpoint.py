"""Craft a checkpoint on disk: routers and adapters are written, dense weights are linked, never loaded."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pesc.config import PescConfig
from pesc.crafting.configuration import crafted_config
from pesc.crafting.families import refuse_moe
from pesc.crafting.load import load_config
from pesc.crafting.skeleton import names_in_model
from pesc.crafting.sources import resolve
from pesc.crafting.surgery import crafted_ffns, new_expert_tensors
from pesc.storage.compare import shape_mismatches
from pesc.storage.files import new_folder
from pesc.storage.weights import INDEX, SINGLE, read_weight_map, tensor_names

EXPERTS_SHARD = "model-experts.safetensors"


# transformers prefers a file of the name SINGLE to an index, so the one dense file of a small model is renamed.
DENSE_SHARD = "model-dense.safetensors"


def craft_checkpoint(model: str | Path, out: str | Path, config: PescConfig) -> Path:
    """Write the crafted model of a dense checkpoint.

    Peak memory is that of the new weights; time is that of writing them.

    Args:
        model: see `pesc.crafting.sources.resolve`; safetensors only.
        out: a folder that does not exist yet.
        config: the method's settings.

    Returns:
        `out`. Dense weights are hard links to the originals, copies where the file system cannot link.

    Raises:
        FileExistsError: when `out` is there already.
        FileNotFoundError, ValueError: for a model that is not there, not dense, or not whole.
    """
    out, source = Path(out).expanduser(), resolve(model)
    dense_config = load_config(model)
    refuse_moe(dense_config)
    if getattr(dense_config, "quantization_config", None):
        raise ValueError(f"{source} is quantized: craft the unquantized model, or the loaded one with pesc.craft")
    weight_map = read_weight_map(source)
    new_config = crafted_config(dense_config, config)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(new_config)
    dtype = _ffn_dtype(skeleton, source, weight_map)
    experts = {name: tensor.to(dtype) for name, tensor in new_expert_tensors(skeleton).items()}
    _check_dense_weights(skeleton, weight_map, set(experts), source)
    with new_folder(out) as folder:
        renamed = {SINGLE: DENSE_SHARD}
        for file in sorted(source.iterdir()):
            if file.is_file() and _belongs(file.name, weight_map):
                _link(file, folder / renamed.get(file.name, file.name))
        save_file(experts, folder / EXPERTS_SHARD, {"format": "pt"})
        new_map = {name: renamed.get(file, file) for name, file in weight_map.items()}
        new_map |= dict.fromkeys(experts, EXPERTS_SHARD)
        size = sum((folder / file).stat().st_size for file in set(new_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(new_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        skeleton.config.dtype = dense_config.dtype or dtype
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.save_pretrained(folder)
    return out


def _check_dense_weights(skeleton: Any, weight_map: dict[str, str], new: set[str], source: Path) -> None:
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}) or {})
    expected = {name: list(p.shape) for name, p in skeleton.state_dict().items() if name not in new}
    in_model = names_in_model(skeleton, weight_map)
    found = {in_model[name]: shape for name, shape in _shapes(source, weight_map).items()}
    untied = {name: shape for name, shape in expected.items() if name in found or name not in tied}
    if lines := shape_mismatches(untied, found, "by the config"):
        listed = "\n".join(f"  {line}" for line in lines)
        raise ValueError(f"{source} does not hold the dense model that its config describes:\n{listed}")


def _ffn_dtype(skeleton: Any, source: Path, weight_map: dict[str, str]) -> torch.dtype:
    # Experts lie beside an FFN and take its dtype; embeddings and norms may have others.
    ffn, _ = crafted_ffns(skeleton)[0]
    for name, in_model in names_in_model(skeleton, weight_map).items():
        if in_model.startswith(f"{ffn}."):
            tensor_names(source / weight_map[name])
            with safe_open(source / weight_map[name], "pt") as tensors:
                return tensors.get_tensor(name).dtype
    return torch.float32


def _shapes(source: Path, weight_map: dict[str, str]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in sorted(set(weight_map.values())):
        tensor_names(source / file)
        with safe_open(source / file, "pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name, f in weight_map.items() if f == file}
    return shapes


def _belongs(name: str, weight_map: dict[str, str]) -> bool:
    if name.endswith(".safetensors"):
        return name in weight_map.values()
    return name not in (INDEX, "config.json") and not name.endswith((".bin", ".pt", ".pth", ".gguf"))


def _link(source: Path, target: Path) -> None:
    # Only weights: of the small files a link would let a later save into the new folder change the original.
    if source.suffix == ".safetensors":
        with suppress(OSError):
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)
