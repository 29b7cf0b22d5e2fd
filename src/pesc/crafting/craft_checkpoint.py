"""Craft a checkpoint on disk: routers and adapters are written, dense weights are linked, never loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pesc.config import PescConfig
from pesc.crafting.configuration import crafted_config
from pesc.crafting.families import refuse_moe
from pesc.crafting.load import locate
from pesc.crafting.skeleton import differences_from, names_in_model, skeleton_of
from pesc.crafting.surgery import crafted_ffns, expert_parameters, new_expert_tensors
from pesc.storage.checksums import CARD, write_checksums
from pesc.storage.files import copy_companions, link_or_copy, new_folder, write_json
from pesc.storage.weights import INDEX, SINGLE, Weights

EXPERTS_SHARD = "model-experts.safetensors"
# transformers prefers a file of the name SINGLE to an index, so the one dense file of a small model is renamed.
DENSE_SHARD = "model-dense.safetensors"


def craft_checkpoint(model: str | Path, out: str | Path, pesc_config: PescConfig) -> Path:
    """Write the crafted model of a dense checkpoint.

    Peak memory is that of the new weights; time is that of writing them, and of hashing all, dense ones included: some
    seconds for 10 GB.

    Args:
        model: a dense model that `locate` finds; safetensors only.
        out: a folder that does not exist yet.
        pesc_config: the method's settings.

    Returns:
        `out`. Dense weights are hard links to the originals, copies if the file system cannot link.

    Raises:
        FileExistsError: `out` is there already.
        FileNotFoundError, ValueError: the model is not there, not dense, or not complete.
    """
    out, ref = Path(out).expanduser(), locate(model)
    if ref.kind == "adapter":
        raise ValueError(f"{model} is an adapter: craft its base, {ref.settings.base_model}, or export it first")
    refuse_moe(ref.config)
    if getattr(ref.config, "quantization_config", None):
        raise ValueError(f"{model} is quantized: craft the unquantized model, or the loaded one with pesc.craft")
    weights = Weights(ref.folder, pickled=False)
    skeleton = skeleton_of(crafted_config(ref.config, pesc_config))
    fault = f"{model} does not hold the dense model that its config describes"
    differences_from(skeleton, weights, new=expert_parameters(skeleton)).refuse(fault)
    dtype = _ffn_dtype(skeleton, weights)
    experts = {name: tensor.to(dtype) for name, tensor in new_expert_tensors(skeleton).items()}
    with new_folder(out) as folder:
        shards = {file: DENSE_SHARD if file.name == SINGLE else file.name for file in weights.files}
        for file, name in shards.items():
            link_or_copy(file, folder / name)
        copy_companions(ref.folder, folder)
        if (card := ref.folder / CARD).is_file():  # it names the licence, which exports look for
            shutil.copyfile(card, folder / CARD)
        save_file(experts, folder / EXPERTS_SHARD, {"format": "pt"})
        weight_map = {name: shards[info.file] for name, info in weights.tensors.items()}
        weight_map |= dict.fromkeys(experts, EXPERTS_SHARD)
        size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
        skeleton.config.dtype = ref.config.dtype or dtype
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.save_pretrained(folder)
        write_checksums(folder)
    return out


def _ffn_dtype(skeleton: Any, weights: Weights) -> torch.dtype:
    # Experts lie beside an FFN and take its dtype; embeddings and norms may have others.
    ffn, _ = crafted_ffns(skeleton)[0]
    for name, in_model in names_in_model(skeleton, weights.tensors).items():
        if in_model.startswith(f"{ffn}."):
            return getattr(torch, weights.tensors[name].dtype)
    return torch.float32
