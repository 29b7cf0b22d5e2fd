"""Damage to the structure of weights and files: headers, names, shapes, types, shards, indexes."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fuzz.damage import ANYTHING, Rng, change_json, change_tensors, of, pick


def _change_header(folder: Path, rng: Rng, change: Callable[[dict[str, Any], str], str]) -> str | None:
    if (file := pick(folder, rng, "*.safetensors")) is None:
        return None
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    said = change(header, name)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"{file.name}: {said}"


@of("structure")
def header_length(folder: Path, rng: Rng) -> str | None:
    if (file := pick(folder, rng, "*.safetensors")) is None:
        return None
    length = rng.choice([0, 1, 7, 2**31, 2**62, 2**64 - 1, file.stat().st_size])
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", length))
    return f"{file.name}: header of {length} bytes"


@of("structure")
def header_byte(folder: Path, rng: Rng) -> str | None:
    if (file := pick(folder, rng, "*.safetensors")) is None:
        return None
    content = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    place = rng.randrange(8, 8 + size)
    content[place] = rng.choice(b'{}[]",:09ax\x00\xff')
    file.write_bytes(content)
    return f"{file.name}: byte {place} of the header is {content[place]}"


@of("structure")
def header_offsets(folder: Path, rng: Rng) -> str | None:
    def change(header: dict[str, Any], name: str) -> str:
        begin, end = header[name]["data_offsets"]
        new = rng.choice([[end, begin], [0, end - begin], [-4, end], [begin, end + 4], [begin, 2**63], [begin], "x", 4])
        header[name]["data_offsets"] = new
        return f"{name} at {new}"

    return _change_header(folder, rng, change)


@of("structure")
def header_dtype(folder: Path, rng: Rng) -> str | None:
    def change(header: dict[str, Any], name: str) -> str:
        header[name]["dtype"] = dtype = rng.choice(["I32", "U32", "F16", "F64", "F4", "X", "C64", None, 7])
        return f"{name} as {dtype}"

    return _change_header(folder, rng, change)


@of("structure")
def header_shape(folder: Path, rng: Rng) -> str | None:
    def change(header: dict[str, Any], name: str) -> str:
        shape = header[name]["shape"]
        other = [shape[::-1], [1, *shape], [-n for n in shape], [2**40] * 3, [], [0], "x", [0.5], None]
        header[name]["shape"] = new = rng.choice(other)
        return f"{name} of shape {new}, was {shape}"

    return _change_header(folder, rng, change)


@of("structure")
def tensor_lost(folder: Path, rng: Rng) -> str | None:
    return change_tensors(folder, rng, lambda tensors, name: f"without {name}" if tensors.pop(name) is not None else "")


@of("structure")
def tensor_renamed(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        new = rng.choice(
            [f"{name}.x", name.replace("layers.0", "layers.9"), f"base.{name}", name.upper(), "[/x]", "\x1b[1m\n"]
        )
        tensors[new] = tensors.pop(name)
        return f"{name} renamed {new}"

    return change_tensors(folder, rng, change)


@of("structure")
def tensor_added(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        layers = ("model.layers.0", "model.layers.7")
        new = rng.choice([f"{layer}.mlp.{part}" for layer in layers for part in ("router.weight", "experts.up_proj")])
        if new in tensors:
            return None
        tensors[new] = torch.randn(4, 8, 32)
        return f"{new} added"

    return change_tensors(folder, rng, change)


@of("structure")
def tensor_reshaped(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        tensor = tensors[name]
        ways = [tensor.flatten(), tensor[:-1], torch.cat([tensor, tensor]), tensor[None], tensor[:0], tensor.sum()]
        tensors[name] = rng.choice(ways)
        return f"{name} is {list(tensors[name].shape)}, was {list(tensor.shape)}"

    return change_tensors(folder, rng, change)


@of("structure")
def tensor_of_integers(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        dtype = rng.choice([torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
        tensors[name] = tensors[name].to(dtype)
        return f"{name} cast to {dtype}"

    return change_tensors(folder, rng, change)


@of("structure")
def file_cut(folder: Path, rng: Rng) -> str | None:
    file = pick(folder, rng, "*")
    content = file.read_bytes()
    kept = rng.choice([0, 1, 8, len(content) // 2, max(0, len(content) - 1)])
    file.write_bytes(content[:kept])
    return f"{file.name} cut from {len(content)} to {kept} bytes"


@of("structure")
def file_longer(folder: Path, rng: Rng) -> str | None:
    file = pick(folder, rng, "*")
    with file.open("ab") as stream:
        stream.write(rng.randbytes(rng.choice([1, 64, 4096])))
    return f"{file.name} has more bytes at its end"


@of("structure")
def file_gone(folder: Path, rng: Rng) -> str | None:
    file = pick(folder, rng, "*")
    file.unlink()
    other = rng.choice(["absent", "a folder", "a loop", "a device", "a pipe", "full of zeros"])
    if other == "a folder":
        file.mkdir()
    elif other == "a pipe":
        os.mkfifo(file)
    elif other == "full of zeros":
        file.touch()
        os.truncate(file, 3 * 1024**3)
    elif other != "absent":
        file.symlink_to(file.name if other == "a loop" else "/dev/zero")
    return f"{file.name} is {other}"


@of("structure")
def files_swapped(folder: Path, rng: Rng) -> str | None:
    files = sorted(file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    if len(files) < 2:
        return None
    first, second = rng.sample(files, 2)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a if rng.random() < 0.5 else b)
    return f"{second.name} in the place of {first.name}"


@of("structure")
def second_weights(folder: Path, rng: Rng) -> str | None:
    """A file that transformers would read in place of the right one, or beside it."""
    if not (folder / "config.json").is_file() or (file := pick(folder, rng, "*.safetensors")) is None:
        return None
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    name = rng.choice(["other.safetensors", "model.safetensors", "model-00001-of-00001.safetensors"])
    save_file(tensors, folder / name, {"format": "pt"})
    if name == "other.safetensors":
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"transformers_weights": name}))
    elif name != "model.safetensors":
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"{name} holds zeros"


@of("structure")
def peft_adapter_beside(folder: Path, rng: Rng) -> str | None:
    values = {"base_model_name_or_path": str(folder.parent / "elsewhere"), "peft_type": "LORA", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return "adapter_config.json names another base"


@of("structure")
def index(folder: Path, rng: Rng) -> str | None:
    if (file := pick(folder, rng, "*.index.json")) is None:
        return None

    def change(values: Any) -> str | None:
        key = rng.choice(list(values["weight_map"]))
        way = rng.choice(["metadata", "weight_map", "tensor", "file", "outside", "other"])
        if way in values:
            value = rng.choice(ANYTHING)
            values.pop(way) if value is None else values.update({way: value})
            return f"{way} is {value!r}"[:99]
        if way == "tensor":
            del values["weight_map"][key]
        else:
            other = rng.choice(list(values["weight_map"].values()))
            places = {"file": "absent.safetensors", "outside": "../x.safetensors", "other": other}
            values["weight_map"][key] = rng.choice([places[way], places[way], 5, None])
        return f"{key}: {way}"

    return change_json(file, change)


@of("structure")
def tensor_in_two_shards(folder: Path, rng: Rng) -> str | None:
    files = sorted(folder.glob("model-*.safetensors"))
    if len(files) < 2:
        return None
    first, second = rng.sample(files, 2)
    tensors = load_file(first)
    name = rng.choice(sorted(tensors))
    save_file(load_file(second) | {name: torch.zeros_like(tensors[name])}, second, {"format": "pt"})
    return f"{name} of {first.name} is in {second.name} too"


class _Attack:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code of the file ran')",)


@of("structure")
def pickle_of_more(folder: Path, rng: Rng) -> str | None:
    if (file := pick(folder, rng, "*.bin")) is None:
        return None
    tensors = torch.load(file, weights_only=True)
    name, way = (
        rng.choice(sorted(tensors)),
        rng.choice(["code", "view", "number", "list", "sparse", "meta", "plain", "zip"]),
    )
    shape = tensors[name].shape
    others = {"view": torch.zeros(1).expand(2**40), "number": 3, "meta": torch.zeros(shape, device="meta")}
    others |= {"code": _Attack(), "sparse": torch.zeros(shape).to_sparse(), "list": [1]}
    if way == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", bytes(2**28))
    elif way == "plain":
        file.write_bytes(pickle.dumps({"x": _Attack()}))
    else:
        torch.save(tensors | {name: others[way]}, file)
    return f"{file.name}: {name} is {way}"


@of("structure")
def gguf_header(folder: Path, rng: Rng) -> str | None:
    if (file := pick(folder, rng, "*.gguf")) is None:
        return None
    content = bytearray(file.read_bytes())
    place, width = rng.choice([(0, 4), (4, 4), (8, 8), (16, 8), (rng.randrange(24, 12000), rng.choice([1, 4, 8]))])
    value = rng.choice([bytes(width), b"\xff" * width, rng.randbytes(width), (3).to_bytes(width, "little")])
    content[place : place + width] = value
    file.write_bytes(content)
    return f"{file.name}: bytes from {place} are {value.hex()}"


@of("structure")
def gguf_name(folder: Path, rng: Rng) -> str | None:
    if (file := pick(folder, rng, "*.gguf")) is None:
        return None
    words = [
        b"attn_q",
        b"attn_output",
        b"token_embd",
        b"output_norm",
        b"ffn_gate_inp",
        b"ffn_down_exps",
        b"ffn_up_shexp",
    ]
    words += [b"block_count", b"expert_count", b"expert_used_count", b"embedding_length", b"head_count", b"blk.1"]
    old = rng.choice(words)
    content = file.read_bytes()
    if old not in content:
        return None
    file.write_bytes(content.replace(old, old[:-1] + b"X", 1))
    return f"{file.name}: {old.decode()} renamed"
