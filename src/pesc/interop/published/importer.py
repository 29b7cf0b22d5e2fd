"""Import a published checkpoint: stream it, tensor by tensor, into a crafted folder of ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pesc.crafting.skeleton import skeleton_of, tied_names
from pesc.crafting.sources import resolve
from pesc.interop.published.layouts import Target, config_from, detect, expert_of, promises, targets
from pesc.storage.compare import shape_mismatches
from pesc.storage.files import copy_companions, new_folder, read_json
from pesc.storage.weights import SHARD_BYTES, ShardWriter, Weights, weight_files

_ROTARY = re.compile(r".*\brotary_emb\.inv_freq")


def import_checkpoint(source: str | Path, out: Path) -> Path:
    """Turn a Camelidae, Qwen2idae or Sparsetral checkpoint into a crafted folder of ours.

    Weights are read one at a time and written in shards no larger than the largest file of the source, which
    bounds memory. Their values and dtypes stay as they are. No code of the checkpoint is run or copied.

    Args:
        source: a folder, or a hub id, of safetensors or `.bin` files.
        out: a folder that does not exist yet.

    Returns:
        `out`, which `pesc.load` and transformers' Auto classes load.

    Raises:
        FileExistsError: when `out` is there already.
        FileNotFoundError: when the source, or a file of it, is not there.
        ValueError: for another layout, a config that leaves out what counts, damaged files, or tensors that
            are missing, unknown or misshapen; all of them are listed.
    """
    folder = source_folder(source)
    values = read_json(folder / "config.json")
    weights = Weights(folder)
    layout = detect(values, weights.tensors)
    config = config_from(values, layout, weights.tensors)
    skeleton = skeleton_of(config)
    plan = targets(skeleton, layout)
    problems = mismatches(plan, weights, tied_names(skeleton))
    problems += rotary_problems(skeleton, weights)
    if problems:
        lost = _all_lost(plan, weights, values)
        lines = "\n".join(f"  {line}" for line in problems)
        raise ValueError(f"{source} does not hold the model its config describes{lost}:\n{lines}")
    with new_folder(out) as partial:
        writer = ShardWriter(partial, min(SHARD_BYTES, weights.largest_file))
        for target in sorted(plan, key=lambda target: str(weights.tensors[target.sources[0]].file)):
            parts = [weights.read(name) for name in target.sources]
            writer.add(target.name, torch.stack(parts) if target.stacked else parts[0])
        writer.finish()
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.save_pretrained(partial)
        copy_companions(folder, partial)
    return out


def source_folder(source: str | Path) -> Path:
    """The folder of a checkpoint; of a hub id, `.bin` files are downloaded where there are no safetensors.

    Raises:
        FileNotFoundError: when there is no such folder, nor a hub model of that name within reach.
    """
    folder = resolve(source)
    if not Path(source).expanduser().is_dir():
        try:
            weight_files(folder)
        except FileNotFoundError:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.model", "pytorch_model*.bin"]))
    return folder


def mismatches(plan: list[Target], weights: Weights, tied: set[str]) -> list[str]:
    """Every foreign tensor that is missing, unknown, misshapen, or at odds with its stack, a line each.

    Args:
        plan: as `targets` makes it.
        weights: the foreign checkpoint.
        tied: names that stand for another tensor; a file may hold them, with the same values.
    """
    found = weights.tensors
    expected = {name: target.shape for target in plan for name in target.sources}
    counted = {n: t.shape for n, t in found.items() if n in expected or not (n in tied or _ROTARY.fullmatch(n))}
    lines = shape_mismatches(expected, counted, "by the config")
    for target in plan:
        dtypes = sorted({found[name].dtype for name in target.sources if name in found})
        if len(dtypes) > 1:
            lines.append(f"mixed dtypes: the experts of {target.name} are {' and '.join(dtypes)}")
    lines += [
        f"untied: {name} differs from the embeddings, but the config ties them"
        for name in sorted(tied & found.keys())
        if not _equals_embeddings(name, weights)
    ]
    return lines


def rotary_problems(skeleton: Any, weights: Weights) -> list[str]:
    """Rotary frequencies that old checkpoints keep as tensors and that differ from the config's.

    They are not stored again: the config gives them.
    """
    stored = [name for name in weights.tensors if _ROTARY.fullmatch(name)]
    if not stored:
        return []
    rotary = type(skeleton.base_model.rotary_emb)(skeleton.config)
    expected = getattr(rotary, "original_inv_freq", rotary.inv_freq).float()
    lines = []
    for name in stored:
        values = weights.read(name).float()
        if values.shape != expected.shape or not torch.allclose(values, expected, rtol=1e-2, atol=0):
            lines.append(f"other frequencies: {name} is not what rope_theta and rope_scaling of the config give")
    return lines


def _equals_embeddings(name: str, weights: Weights) -> bool:
    embeddings = "model.embed_tokens.weight"
    return embeddings not in weights.tensors or torch.equal(weights.read(name), weights.read(embeddings))


def _all_lost(plan: list[Target], weights: Weights, values: dict[str, Any]) -> str:
    promised = {name for target in plan for name in target.sources if expert_of(name)}
    if promised & weights.tensors.keys():
        return ""
    said = ", ".join(promises(values))
    return f"; all experts are lost, which the config promises ({said}), and only the dense model is left"
