"""Import a published checkpoint: stream it, tensor by tensor, into a crafted folder of ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pesc.crafting.refusals import refused_in_one_line
from pesc.crafting.skeleton import skeleton_of, tied_names
from pesc.interop.format import Reader
from pesc.interop.published.layouts import Target, config_from, detect, expert_of, is_published, promises, targets
from pesc.storage.compare import TensorDifferences, compare_tensors
from pesc.storage.files import copy_companions
from pesc.storage.weights import SHARD_BYTES, ShardWriter, Weights

_ROTARY = re.compile(r".*\brotary_emb\.inv_freq")


def _read(folder: Path, values: dict[str, Any], weights: Weights, out: Path) -> None:
    """Stream a checkpoint into a crafted folder of ours.

    Weights are read one at a time and written in shards no larger than the largest file of the source, which
    bounds memory. Their values and dtypes stay as they are. No code of the checkpoint is run or copied.

    Raises:
        ValueError: the config leaves out a setting that counts, or tensors are missing, unknown or misshapen; all of
            them are listed.
    """
    with refused_in_one_line(str(folder / "config.json")):
        layout = detect(values, weights.tensors)
        skeleton = skeleton_of(config_from(values, layout, weights.tensors))
    plan = targets(skeleton, layout)
    fault = f"{folder} does not hold the model its config describes"
    if not any(expert_of(name) for name in weights.tensors):
        said = ", ".join(promises(values))
        fault += f"; all experts are lost, which the config promises ({said}), and only the dense model is left"
    plan_differences(plan, weights, skeleton).refuse(fault)
    writer = ShardWriter(out, min(SHARD_BYTES, max(weights.file_sizes)))
    for target in sorted(plan, key=lambda target: str(weights.tensors[target.sources[0]].file)):
        parts = [weights.read(name) for name in target.sources]
        writer.add(target.name, torch.stack(parts) if target.stacked else parts[0])
    writer.finish()
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(out)
    copy_companions(folder, out)


READER = Reader(recognises=is_published, read=_read)


def plan_differences(plan: list[Target], weights: Weights, skeleton: Any) -> TensorDifferences:
    """Every published tensor that is missing, unknown, misshapen, or at odds with its stack or the config.

    Args:
        plan: as `targets` makes it.
        weights: the published checkpoint.
        skeleton: the crafted model. A file may hold its tied tensors, with the same values.
    """
    found, tied = weights.tensors, tied_names(skeleton)
    expected = {name: target.shape for target in plan for name in target.sources}
    counted = {n: t.shape for n, t in found.items() if n in expected or not (n in tied or _ROTARY.fullmatch(n))}
    differences = compare_tensors(expected, counted)
    for target in plan:
        dtypes = sorted({found[name].dtype for name in target.sources if name in found})
        if len(dtypes) > 1:
            differences.others.append(f"mixed dtypes: the experts of {target.name} are {' and '.join(dtypes)}")
    differences.others += untied(skeleton, weights) + _rotary_problems(skeleton, weights)
    return differences


def untied(skeleton: Any, weights: Weights) -> list[str]:
    """Tensors that the config ties to the embeddings and that the files hold with other values, a line each."""
    embeddings, tied = "model.embed_tokens.weight", tied_names(skeleton) & weights.tensors.keys()
    return [
        f"untied: {name} differs from the embeddings, but the config ties them"
        for name in sorted(tied)
        if embeddings in weights.tensors and not torch.equal(weights.read(name), weights.read(embeddings))
    ]


def _rotary_problems(skeleton: Any, weights: Weights) -> list[str]:
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
