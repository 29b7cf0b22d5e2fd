"""Verify a GGUF file: the tensors its metadata promises, or the experts that a converter lost."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pesc.crafting.refusals import refuse_absurd_numbers
from pesc.interop.gguf.exporter import GLM, GRANITE
from pesc.interop.published.layouts import NAMES
from pesc.interop.verify.findings import Examination, Report
from pesc.storage.compare import compare_tensors

_OURS = re.compile(r"\bpesc\b", re.IGNORECASE)
_STACK = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")
# Files of an older converter hold each expert's matrix apart.
_SINGLE = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight")
_ROUTER = re.compile(r"blk\.\d+\.ffn_gate_inp\.weight")
# The shared expert's gate is a row of zeros in the Qwen architectures of our exports.
_NEVER_ZERO = re.compile(r"(?!.*ffn_gate_inp_shexp).+\.weight")
# Texts of any length and content.
_LONG = ("tokenizer.", "general.license")
Numbers = Callable[[str], int]


def check_gguf(file: Path, report: Report) -> None:
    """Check one GGUF file and add to the report; one tensor, or one expert of a stack, is read at a time.

    Args:
        file: the file.
        report: gets the findings and facts.

    Raises:
        FileNotFoundError: when the package `gguf` is not installed.
        ValueError: the file is damaged, or its metadata makes no sense.
    """
    report.facts["bytes"] = file.stat().st_size
    reader, fields = _read(file)
    architecture = fields.get("general.architecture")
    report.facts["architecture"] = architecture
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    refuse_absurd_numbers(fields, file)
    for before, after in pairwise(sorted(reader.tensors, key=lambda tensor: tensor.data_offset)):
        if after.data_offset < before.data_offset + before.n_bytes:
            report.add("error", f"{before.name} and {after.name} overlap in the file")

    def number(name: str) -> int:
        value = fields.get(key := f"{architecture}.{name}", 0)
        if type(value) is not int or value < 0:
            raise ValueError(f"{key} ({value!r}) must be an integer of at least 0")
        return value

    if number("expert_count"):
        _check_promised(str(architecture), number, tensors, report)
    else:
        _check_dense(fields, tensors, file, report)
    _examine(tensors, report)


def _read(file: Path) -> tuple[Any, dict[str, Any]]:
    """A reader, and metadata by key; long arrays, such as vocabularies, are left out."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise FileNotFoundError("reading GGUF files needs the package gguf: pip install gguf") from error

    class Reader(GGUFReader):
        # The package's own reads nothing behind the file's end and goes on, as often as a damaged count says.
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, before what its header promises")
            return super()._get(offset, dtype, count, *rest, **named)

    try:
        reader = Reader(file)
        return reader, {key: field.contents() for key, field in reader.fields.items() if len(field.data) <= 64}
    except Exception as error:  # The package checks little, so damage surfaces as any error of Python and numpy.
        raise ValueError(f"{file} is damaged or truncated ({error}): download or convert it again") from error


def _check_promised(architecture: str, number: Numbers, tensors: dict[str, Any], report: Report) -> None:
    experts, chosen = number("expert_count"), number("expert_used_count")
    blocks, dense = number("block_count"), number("leading_dense_block_count")
    if not 1 <= chosen <= experts:
        report.add("error", f"expert_used_count ({chosen}) must be from 1 to expert_count ({experts})")
    if not dense < blocks <= len(tensors):
        raise ValueError(
            f"{architecture}.block_count ({blocks}) must be above leading_dense_block_count ({dense}), and fit the "
            f"file, which holds {len(tensors)} tensors"
        )
    present = {block: _experts_of(block, tensors) for block in range(dense, blocks)}
    promised = experts * len(present)
    report.facts |= {"experts promised": promised, "experts present": sum(present.values())}
    if promised and not any(present.values()):
        report.add("error", f"all experts are lost: expert_count is {experts}, but the file holds none")
    elif lost := [f"block {block}: {held}" for block, held in present.items() if held != experts]:
        report.add("error", f"expert_count promises {experts} experts in every block; found {', '.join(lost)}")
    found = {name: [int(size) for size in tensor.shape] for name, tensor in tensors.items()}
    if architecture == GRANITE or (architecture == GLM and not dense):
        parts = _block(architecture, number, found)
        expected = {f"blk.{block}.{part}": shape for block in range(blocks) for part, shape in parts.items()}
        expected |= _top(number, found)
        differences = compare_tensors(expected, found)
    else:
        # Of other architectures, what all of them have.
        expected = {f"blk.{block}.ffn_gate_inp.weight": [number("embedding_length"), experts] for block in present}
        expected |= {name: found.get(name, []) for name in ("token_embd.weight", "output_norm.weight")}
        stray = [name for name in found if (match := _STACK.fullmatch(name)) and int(match[1]) not in present]
        differences = compare_tensors(expected, {name: found[name] for name in (*expected, *stray) if name in found})
    for line in differences.lines("by the metadata"):
        report.add("error", line)


def _top(number: Numbers, found: dict[str, list[int]]) -> dict[str, list[int]]:
    """Shapes of the tensors outside the blocks, innermost size first; `found` says which of two are there."""
    hidden, rows = number("embedding_length"), number("vocab_size")
    optional = {"output.weight": [hidden, rows], "rope_freqs.weight": [number("rope.dimension_count") // 2]}
    return {"token_embd.weight": [hidden, rows], "output_norm.weight": [hidden]} | {
        name: shape for name, shape in optional.items() if name in found
    }


def _block(architecture: str, number: Numbers, found: dict[str, list[int]]) -> dict[str, list[int]]:
    """Shapes of a block's tensors, innermost size first; all blocks have the biases that one has."""
    hidden, experts = number("embedding_length"), number("expert_count")
    head = number("attention.key_length") or hidden // max(number("attention.head_count"), 1)
    wide, narrow = (head * number(f"attention.head_count{kind}") for kind in ("", "_kv"))
    shapes = {"attn_norm": [hidden], "ffn_gate_inp": [hidden, experts]}
    shapes |= {"attn_q": [hidden, wide], "attn_output": [wide, hidden]}
    shapes |= {"attn_k": [hidden, narrow], "attn_v": [hidden, narrow]}
    if architecture == GLM:
        width = number("expert_feed_forward_length")
        shared = width * number("expert_shared_count")
        shapes |= {"attn_q_norm": [head], "attn_k_norm": [head], "post_attention_norm": [hidden]}
    else:
        width, shared = number("feed_forward_length"), number("expert_shared_feed_forward_length")
        shapes |= {"ffn_norm": [hidden]}
    shapes |= {f"ffn_{part}_exps": [hidden, width, experts] for part in ("gate", "up")}
    shapes |= {"ffn_down_exps": [width, hidden, experts]}
    if shared:
        shapes |= {"ffn_gate_shexp": [hidden, shared], "ffn_up_shexp": [hidden, shared]}
        shapes |= {"ffn_down_shexp": [shared, hidden]}
    biased = {part for part in ("q", "k", "v", "output") if any(name.endswith(f".attn_{part}.bias") for name in found)}
    biases = {f"attn_{part}.bias": shapes[f"attn_{part}"][1:] for part in biased}
    if architecture == GLM:
        biases["exp_probs_b.bias"] = [experts]
    return {f"{part}.weight": shape for part, shape in shapes.items()} | biases


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
            if _ROUTER.fullmatch(name):
                examination.router(name, values)
            elif match := stack or single:
                expert = number if stack else int(match[3])
                examination.expert(f"block {match[1]}", expert, match[2], values, last=match[2] == "down")
            elif _NEVER_ZERO.fullmatch(name) and not values.any():
                examination.zero(name)
    if unread:
        kinds = ", ".join(sorted(unread))
        report.add("note", f"values of {kinds} were not looked at: the package gguf cannot dequantize them")
    # Norms in F32 beside quantized matrices are how GGUF files are.
    examination.report(report, mixed_dtypes_are_usual=True)
