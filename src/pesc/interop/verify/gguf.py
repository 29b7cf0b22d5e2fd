"""Verify a GGUF file: the experts its metadata promises, or those that a converter lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pesc.interop.published.layouts import NAMES
from pesc.interop.verify.findings import Examination, Report

_OURS = re.compile(r"\bpesc\b", re.IGNORECASE)
_STACK = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")
# Files of an older converter hold each expert's matrix apart.
_SINGLE = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight")
# Texts of any length and content.
_LONG = ("tokenizer.", "general.license")


def check_gguf(file: Path, report: Report) -> None:
    """Check one GGUF file and add to the report; one tensor, or one expert of a stack, is read at a time.

    Args:
        file: the file.
        report: gets the findings and facts.

    Raises:
        FileNotFoundError: when the package `gguf` is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise FileNotFoundError("reading GGUF files needs the package gguf: pip install gguf") from error
    report.facts["bytes"] = file.stat().st_size
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        report.add("error", f"{file} is damaged or truncated ({error}): download or convert it again")
        return
    fields = _fields(reader)
    architecture = fields.get("general.architecture")
    report.facts["architecture"] = architecture
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    experts = fields.get(f"{architecture}.expert_count") or 0
    if experts:
        _check_promised(fields, tensors, report)
    else:
        _check_dense(fields, tensors, file, report)
    _examine(tensors, report)


def _fields(reader: Any) -> dict[str, Any]:
    """Metadata by key; long arrays, such as vocabularies, are left out."""
    return {key: field.contents() for key, field in reader.fields.items() if len(field.data) <= 64}


def _check_promised(fields: dict[str, Any], tensors: dict[str, Any], report: Report) -> None:
    architecture = fields["general.architecture"]
    experts, chosen = fields[f"{architecture}.expert_count"], fields.get(f"{architecture}.expert_used_count")
    blocks = fields.get(f"{architecture}.block_count", 0)
    dense = fields.get(f"{architecture}.leading_dense_block_count", 0)
    if not chosen or chosen > experts:
        report.add("error", f"expert_used_count ({chosen}) must be from 1 to expert_count ({experts})")
    if not blocks:
        report.add("error", f"{architecture}.block_count is missing: the number of layers is not told")
    hidden = fields.get(f"{architecture}.embedding_length")
    present, lost = 0, []
    for block in range(dense, blocks):
        router = tensors.get(f"blk.{block}.ffn_gate_inp.weight")
        if router is None:
            report.add("error", f"missing: blk.{block}.ffn_gate_inp.weight (the router)")
        elif (shape := [int(size) for size in router.shape]) != [hidden, experts]:
            expected = f"{[hidden, experts]} by the metadata"
            report.add("error", f"wrong shape: the router {router.name} is {shape}, {expected}")
        held = _experts_of(block, tensors)
        present += held
        if held != experts:
            lost.append(f"block {block}: {held}")
    promised = experts * max(blocks - dense, 0)
    report.facts |= {"experts promised": promised, "experts present": present}
    if promised and not present:
        report.add("error", f"all experts are lost: expert_count is {experts}, but the file holds none")
    elif lost:
        report.add("error", f"expert_count promises {experts} experts in every block; found {', '.join(lost)}")


def _experts_of(block: int, tensors: dict[str, Any]) -> int:
    """How many complete experts a block holds: the fewest among the first and the last matrices."""

    def count(part: str) -> int:
        stack = tensors.get(f"blk.{block}.ffn_{part}_exps.weight")
        if stack is not None:
            return int(stack.shape[2]) if len(stack.shape) == 3 else 0
        start = f"blk.{block}.ffn_{part}."
        return sum(name.startswith(start) and _SINGLE.fullmatch(name) is not None for name in tensors)

    gated = count("gate_up")
    return min(count("down"), gated or count("up"), gated or count("gate") or count("up"))


def _check_dense(fields: dict[str, Any], tensors: dict[str, Any], file: Path, report: Report) -> None:
    texts = {key: str(value) for key, value in fields.items() if not key.startswith(_LONG)}
    said = [f"{key} {text!r}" for key, text in texts.items() if NAMES.search(text) or _OURS.search(text)]
    if NAMES.search(file.name):
        said.append(f"the file's name {file.name!r}")
    held = [name for name in tensors if _STACK.fullmatch(name) or _SINGLE.fullmatch(name)]
    report.facts |= {"experts present": len(held)}
    if held:
        report.add("error", f"expert_count is missing, but the file holds experts ({held[0]}, …)")
    elif said:
        report.add(
            "error",
            f"all experts are lost: the file was made from a model with experts ({'; '.join(said)}), but "
            f"holds a dense {fields.get('general.architecture')} model; its converter left "
            "them out without a word",
        )
    else:
        report.add("note", "the metadata promises no experts: a dense model, as far as the file tells")


def _examine(tensors: dict[str, Any], report: Report) -> None:
    from gguf.quants import dequantize

    examination, unread = Examination(), set()
    for name, tensor in tensors.items():
        examination.counted(tensor.tensor_type.name, int(tensor.n_elements))
        stack, single = _STACK.fullmatch(name), _SINGLE.fullmatch(name)
        slices = tensor.data if stack else [tensor.data]
        for number, data in enumerate(slices):
            try:
                values = torch.from_numpy(dequantize(data, tensor.tensor_type).copy())
            except NotImplementedError:
                unread.add(tensor.tensor_type.name)
                continue
            examination.values(name, values)
            if match := stack or single:
                expert = number if stack else int(match[3])
                examination.expert(f"block {match[1]}", expert, match[2], values, last=match[2] == "down")
    if unread:
        kinds = ", ".join(sorted(unread))
        report.add("note", f"values of {kinds} were not looked at: the package gguf cannot dequantize them")
    # Norms in F32 beside quantized matrices are how GGUF files are.
    examination.report(report, mixed_dtypes_are_usual=True)
