"""Damage to the numbers of weights."""

from __future__ import annotations

from pathlib import Path

import torch

from fuzz.damage import Rng, change_tensors, of, pick


@of("values")
def tensor_filled(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        value = rng.choice([float("nan"), float("inf"), 0.0, 1.0])
        tensors[name].view(-1)[rng.choice([slice(0, 1), slice(None)])] = value
        return f"{value} in {name}"

    return change_tensors(folder, rng, change)


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

    return change_tensors(folder, rng, change)


@of("values")
def rows_moved(folder: Path, rng: Rng) -> str | None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str | None:
        if torch.equal(tensors[name].roll(1, 0), tensors[name]):
            return None
        tensors[name] = tensors[name].roll(1, 0)
        return f"rows of {name} moved by one"

    return change_tensors(folder, rng, change)


@of("values")
def bit_flipped(folder: Path, rng: Rng) -> str | None:
    file = pick(folder, rng, rng.choice(["*.safetensors", "*.bin", "*.gguf"]))
    if file is None:
        return None
    content = bytearray(file.read_bytes())
    place, bit = rng.randrange(len(content) * 3 // 4, len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"{file.name}: bit {bit} of byte {place} flipped"
