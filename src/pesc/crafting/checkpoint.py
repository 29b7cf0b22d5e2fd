"""Craft a checkpoint on disk: routers and adapters are written, dense weights are linked, never loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from pesc.config import PescConfig
from pesc.crafting.dense import load_config, resolve
from pesc.crafting.model_config import crafted_config
from pesc.crafting.surgery import crafted_ffns, new_expert_tensors, refuse_moe

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXPERTS_SHARD = "model-experts.safetensors"
# transformers prefers a file of the name SINGLE to an index, so the one dense file of a small model is renamed.
DENSE_SHARD = "model-dense.safetensors"


def craft_checkpoint(model: str | Path, out: str | Path, config: PescConfig) -> Path:
    """Write the crafted model of a dense checkpoint.

    Peak memory is that of the new weights; time is that of writing them.

    Args:
        model: see `pesc.crafting.dense.resolve`; safetensors only.
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


def read_weight_map(folder: Path) -> dict[str, str]:
    """Which file of a checkpoint holds each tensor.

    Raises:
        FileNotFoundError: when there are no safetensors files, or the index names one that is missing.
        ValueError: when a file is damaged.
    """
    if (folder / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{folder / INDEX} is no index of a checkpoint ({error}): download it again") from error
    elif (folder / SINGLE).is_file():
        weight_map = dict.fromkeys(tensor_names(folder / SINGLE), SINGLE)
    else:
        pickled = " (.bin files are pickles: save the model again as safetensors)" if list(folder.glob("*.bin")) else ""
        raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}{pickled}")
    missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which its index names: download them again")
    return weight_map


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The name in the model of each tensor of a checkpoint: another one where transformers renames weights."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    found = {}
    for name in names:
        found[name] = name
        for rule in renamings:
            found[name], _ = rule.rename_source_key(found[name])
    return found


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file.

    Raises:
        ValueError: when the file is damaged or cut short.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): download it again") from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` only when the block succeeds.

    Raises:
        FileExistsError: when `out` is there already.
        OSError: when the disk is full, saying so; what was written is removed.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"the disk is full: {out} was not written; free some space", str(out)
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def shape_mismatches(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], promised: str
) -> list[str]:
    """Every missing, unexpected and misshapen tensor, a line each.

    Args:
        expected: shapes by name.
        found: those in a file.
        promised: where the expected shapes come from, as the lines say it: "by the config", "in the model".
    """
    lines = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"unexpected: {name}" for name in sorted(found.keys() - expected.keys())]
    lines += [
        f"wrong shape: {name} is {list(found[name])} in the file, {list(expected[name])} {promised}"
        for name in sorted(expected.keys() & found.keys())
        if list(found[name]) != list(expected[name])
    ]
    return lines


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
