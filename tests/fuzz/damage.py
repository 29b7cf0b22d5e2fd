"""Ways to damage a model's folder, each a small function: structure, values, settings.

A damage changes files of the folder that it is given and says what it did; None means that it does not apply there.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Rng = random.Random
Damage = Callable[[Path, Rng], str | None]
FAMILIES: dict[str, dict[str, Damage]] = {"structure": {}, "values": {}, "settings": {}}

_ANYTHING: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, 10**400, 0.5, -1.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../x", "1", "(.*a)*b", "[/x]", "\x00", [], [1], ["x"], [[]], {}, {"x": 1}, [10**9] * 3),
]
_VALID: dict[str, list[Any]] = {
    "num_experts_per_tok": [1, 3],
    "topk": [1, 3],
    "adapter_scaling": [0.5],
    "moe_scaling": [0.5],
    "adapter_placement": ["parallel", "sequential"],
    "rope_theta": [5e5],
    "factor": [2.0],
    "rms_norm_eps": [1e-3],
    "hidden_act": ["gelu", "relu"],
    "num_attention_heads": [8, 2],
    "num_key_value_heads": [1, 4],
    "sliding_window": [2],
    "tie_word_embeddings": [True, False],
    "router_aux_loss_coef": [0.5],
    "norm_topk_prob": [True, False],
    "embedding_multiplier": [2.0],
    "residual_multiplier": [0.5],
    "logits_scaling": [2.0],
    "attention_multiplier": [0.1],
    "shared_intermediate_size": [24],
    "model_type": ["llama", "mistral", "qwen2", "gemma", "pesc"],
    "base_model_type": ["mistral", "qwen2"],
    "dtype": ["bfloat16", "float16", "int8"],
    "lora_alpha": [4, 16],
    "use_rslora": [True],
    "fan_in_fan_out": [True],
    "target_modules": [["q_proj"], "all-linear"],
    "chat_template": ["{{ 1 / 0 }}", "x"],
    "eos_token_id": [7],
}


def of(family: str) -> Callable[[Damage], Damage]:
    """Add a damage to a family."""

    def add(damage: Damage) -> Damage:
        FAMILIES[family][damage.__name__] = damage
        return damage

    return add


def _pick(folder: Path, rng: Rng, pattern: str) -> Path | None:
    files = sorted(file for file in folder.glob(pattern) if file.is_file() and file.name != "expected.safetensors")
    return rng.choice(files) if files else None


def _nested(values: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value of a JSON document."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for key, value in items for place in [(values, key), *_nested(value)]]


def _json_file(folder: Path, rng: Rng) -> Path | None:
    """Mostly the file that says what the model is."""
    main = [file for name in ("config.json", "adapter.json") if (file := folder / name).is_file()]
    return rng.choice(main) if main and rng.random() < 0.7 else _pick(folder, rng, "*.json")


def _change_json(file: Path, change: Callable[[Any], str | None]) -> str | None:
    values = json.loads(file.read_text())
    said = change(values)
    file.write_text(json.dumps(values))
    return said and f"{file.name}: {said}"


# --- headers of safetensors -------------------------------------------------------------------------------------


def _change_header(folder: Path, rng: Rng, change: Callable[[dict[str, Any], str], str]) -> str | None:
    if (file := _pick(folder, rng, "*.safetensors")) is None:
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
    if (file := _pick(folder, rng, "*.safetensors")) is None:
        return None
    length = rng.choice([0, 1, 7, 2**31, 2**62, 2**64 - 1, file.stat().st_size])
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", length))
    return f"{file.name}: header of {length} bytes"


@of("structure")
def header_byte(folder: Path, rng: Rng) -> str | None:
    if (file := _pick(folder, rng, "*.safetensors")) is None:
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


# --- tensors ----------------------------------------------------------------------------------------------------


def _change_tensors(folder: Path, rng: Rng, change: Callable[[dict[str, torch.Tensor], str], str | None]) -> str | None:
    file = _pick(folder, rng, "*.safetensors") or _pick(folder, rng, "*.bin")
    if file is None:
        return None
    pickled = file.suffix == ".bin"
    tensors = torch.load(file, weights_only=True) if pickled else load_file(file)
    if (said := change(tensors, rng.choice(sorted(tensors)))) is None:
        return None
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    torch.save(tensors, file) if pickled else save_file(tensors, file, {"format": "pt"})
    return f"{file.name}: {said}"


@of("structure")
def tensor_lost(folder: Path, rng: Rng) -> str | None:
    return _change_tensors(
        folder, rng, lambda tensors, name: f"without {name}" if tensors.pop(name) is not None else ""
    )


@of("structure")
def tensor_renamed(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        new = rng.choice(
            [f"{name}.x", name.replace("layers.0", "layers.9"), f"base.{name}", name.upper(), "[/x]", "\x1b[1m\n"]
        )
        tensors[new] = tensors.pop(name)
        return f"{name} renamed {new}"

    return _change_tensors(folder, rng, change)


@of("structure")
def tensor_added(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        layers = ("model.layers.0", "model.layers.7")
        new = rng.choice([f"{layer}.mlp.{part}" for layer in layers for part in ("router.weight", "experts.up_proj")])
        if new in tensors:
            return None
        tensors[new] = torch.randn(4, 8, 32)
        return f"{new} added"

    return _change_tensors(folder, rng, change)


@of("structure")
def tensor_reshaped(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        tensor = tensors[name]
        ways = [tensor.flatten(), tensor[:-1], torch.cat([tensor, tensor]), tensor[None], tensor[:0], tensor.sum()]
        tensors[name] = rng.choice(ways)
        return f"{name} is {list(tensors[name].shape)}, was {list(tensor.shape)}"

    return _change_tensors(folder, rng, change)


@of("structure")
def tensor_of_integers(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        dtype = rng.choice([torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
        tensors[name] = tensors[name].to(dtype)
        return f"{name} cast to {dtype}"

    return _change_tensors(folder, rng, change)


# --- files ------------------------------------------------------------------------------------------------------


@of("structure")
def file_cut(folder: Path, rng: Rng) -> str | None:
    file = _pick(folder, rng, "*")
    content = file.read_bytes()
    kept = rng.choice([0, 1, 8, len(content) // 2, max(0, len(content) - 1)])
    file.write_bytes(content[:kept])
    return f"{file.name} cut from {len(content)} to {kept} bytes"


@of("structure")
def file_longer(folder: Path, rng: Rng) -> str | None:
    file = _pick(folder, rng, "*")
    with file.open("ab") as stream:
        stream.write(rng.randbytes(rng.choice([1, 64, 4096])))
    return f"{file.name} has more bytes at its end"


@of("structure")
def file_gone(folder: Path, rng: Rng) -> str | None:
    file = _pick(folder, rng, "*")
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
    if not (folder / "config.json").is_file() or (file := _pick(folder, rng, "*.safetensors")) is None:
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
    if (file := _pick(folder, rng, "*.index.json")) is None:
        return None

    def change(values: Any) -> str | None:
        key = rng.choice(list(values["weight_map"]))
        way = rng.choice(["metadata", "weight_map", "tensor", "file", "outside", "other"])
        if way in values:
            value = rng.choice(_ANYTHING)
            values.pop(way) if value is None else values.update({way: value})
            return f"{way} is {value!r}"[:99]
        if way == "tensor":
            del values["weight_map"][key]
        else:
            other = rng.choice(list(values["weight_map"].values()))
            places = {"file": "absent.safetensors", "outside": "../x.safetensors", "other": other}
            values["weight_map"][key] = rng.choice([places[way], places[way], 5, None])
        return f"{key}: {way}"

    return _change_json(file, change)


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
    if (file := _pick(folder, rng, "*.bin")) is None:
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


# --- JSON -------------------------------------------------------------------------------------------------------


@of("structure")
def json_syntax(folder: Path, rng: Rng) -> str | None:
    if (file := _json_file(folder, rng)) is None:
        return None
    text = file.read_text()
    depth = rng.choice([10_000, 200_000])
    ways = {
        "not closed": text.rstrip()[:-1],
        "a list": f"[{text}]",
        "nothing": "",
        "a number": "7",
        "null": "null",
        "nested": "[" * depth + "]" * depth,
        "nested below": text.rstrip()[:-1] + ', "x": ' + '{"x":' * depth + "1" + "}" * depth + "}",
        "UTF-16": text.encode("utf-16").decode("latin1"),
        "a long number": text.rstrip()[:-1] + ', "x": ' + "9" * 5000 + "}",
    }
    way = rng.choice(list(ways))
    file.write_text(ways[way])
    return f"{file.name} is {way}"


@of("structure")
def json_value(folder: Path, rng: Rng) -> str | None:
    if (file := _json_file(folder, rng)) is None:
        return None

    def change(values: Any) -> str:
        container, key = rng.choice(_nested(values)[:400])
        container[key] = value = rng.choice(_ANYTHING)
        return f"{key} is {value!r}"[:99]

    return _change_json(file, change)


@of("structure")
def json_key_lost(folder: Path, rng: Rng) -> str | None:
    if (file := _json_file(folder, rng)) is None:
        return None

    def change(values: Any) -> str:
        container, key = rng.choice([place for place in _nested(values)[:400] if isinstance(place[0], dict)])
        del container[key]
        return f"without {key}"

    return _change_json(file, change)


@of("structure")
def json_key_added(folder: Path, rng: Rng) -> str | None:
    if (file := _json_file(folder, rng)) is None:
        return None
    keys = ["transformers_weights", "quantization_config", "auto_map", "num_experts", "num_local_experts", "pesc"]
    keys += ["adapter_dim", "base_model_type", "layer_types", "rope_scaling", "attn_implementation", "text_config"]
    keys += ["torch_dtype", "pruned_heads", "vocab_size", "head_dim", "rank_pattern", "megatron_config", "use_dora"]
    keys += ["_attn_implementation", "experts_implementation", "id2label", "num_labels", "is_encoder_decoder"]

    def change(values: Any) -> str:
        target = values["lora"] if isinstance(values.get("lora"), dict) and rng.random() < 0.5 else values
        key, value = rng.choice(keys), rng.choice([*_ANYTHING, {"quant_method": "bitsandbytes"}, {"(a*)*b": 8}])
        target[key] = value
        return f"{key} is {value!r}"[:99]

    return _change_json(file, change)


# --- GGUF -------------------------------------------------------------------------------------------------------


@of("structure")
def gguf_header(folder: Path, rng: Rng) -> str | None:
    if (file := _pick(folder, rng, "*.gguf")) is None:
        return None
    content = bytearray(file.read_bytes())
    place, width = rng.choice([(0, 4), (4, 4), (8, 8), (16, 8), (rng.randrange(24, 12000), rng.choice([1, 4, 8]))])
    value = rng.choice([bytes(width), b"\xff" * width, rng.randbytes(width), (3).to_bytes(width, "little")])
    content[place : place + width] = value
    file.write_bytes(content)
    return f"{file.name}: bytes from {place} are {value.hex()}"


@of("structure")
def gguf_name(folder: Path, rng: Rng) -> str | None:
    if (file := _pick(folder, rng, "*.gguf")) is None:
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


# --- values -----------------------------------------------------------------------------------------------------


@of("values")
def tensor_filled(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        value = rng.choice([float("nan"), float("inf"), 0.0, 1.0])
        tensors[name].view(-1)[rng.choice([slice(0, 1), slice(None)])] = value
        return f"{value} in {name}"

    return _change_tensors(folder, rng, change)


@of("values")
def tensors_alike(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        shape = tensors[name].shape
        others = [other for other in sorted(tensors) if other != name and tensors[other].shape == shape]
        if not others:
            return None
        other, swap = rng.choice(others), rng.random() < 0.5
        if torch.equal(tensors[other], tensors[name]):
            return None
        tensors[other], tensors[name] = (tensors[name], tensors[other]) if swap else (tensors[name], tensors[name])
        return f"{other} {'swapped with' if swap else 'a copy of'} {name}"

    return _change_tensors(folder, rng, change)


@of("values")
def rows_moved(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        if torch.equal(tensors[name].roll(1, 0), tensors[name]):
            return None
        tensors[name] = tensors[name].roll(1, 0)
        return f"rows of {name} moved by one"

    return _change_tensors(folder, rng, change)


@of("values")
def bit_flipped(folder: Path, rng: Rng) -> str | None:
    file = _pick(folder, rng, rng.choice(["*.safetensors", "*.bin", "*.gguf"]))
    if file is None:
        return None
    content = bytearray(file.read_bytes())
    place, bit = rng.randrange(len(content) * 3 // 4, len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"{file.name}: bit {bit} of byte {place} flipped"


# --- settings ---------------------------------------------------------------------------------------------------


@of("settings")
def another_setting(folder: Path, rng: Rng) -> str | None:
    if (file := _json_file(folder, rng)) is None:
        return None

    def change(values: Any) -> str | None:
        places = [(holder, key) for holder, key in _nested(values) if key in _VALID]
        if not places:
            return None
        holder, key = rng.choice(places)
        old, holder[key] = holder[key], rng.choice([value for value in _VALID[key] if value != holder[key]] or [None])
        return f"{key} is {holder[key]!r}, was {old!r}"

    return _change_json(file, change)
