"""Ways to damage a folder, each a small function in one of three families: structure, values, settings.

A damage changes files of the folder that it is given and says what it did; None means that it does not apply there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Rng = random.Random
Damage = Callable[[Path, Rng], str | None]
FAMILIES: dict[str, dict[str, Damage]] = {"structure": {}, "values": {}, "settings": {}}
ANYTHING: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, 10**400, 0.5, -1.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../x", "1", "(.*a)*b", "[/x]", "\x00", [], [1], ["x"], [[]], {}, {"x": 1}, [10**9] * 3),
]
"""Values to put in the place of any other."""


def of(family: str) -> Callable[[Damage], Damage]:
    """Add a damage to a family."""

    def add(damage: Damage) -> Damage:
        FAMILIES[family][damage.__name__] = damage
        return damage

    return add


def pick(folder: Path, rng: Rng, pattern: str) -> Path | None:
    files = sorted(file for file in folder.glob(pattern) if file.is_file() and file.name != "expected.safetensors")
    return rng.choice(files) if files else None


def nested(values: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value of a JSON document."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for key, value in items for place in [(values, key), *nested(value)]]


def json_file(folder: Path, rng: Rng) -> Path | None:
    """Mostly the file that says what the model is."""
    main = [file for name in ("config.json", "adapter.json") if (file := folder / name).is_file()]
    return rng.choice(main) if main and rng.random() < 0.7 else pick(folder, rng, "*.json")


def change_json(file: Path, change: Callable[[Any], str | None]) -> str | None:
    values = json.loads(file.read_text())
    said = change(values)
    file.write_text(json.dumps(values))
    return said and f"{file.name}: {said}"


def change_tensors(folder: Path, rng: Rng, change: Callable[[dict[str, torch.Tensor], str], str | None]) -> str | None:
    file = pick(folder, rng, "*.safetensors") or pick(folder, rng, "*.bin")
    if file is None:
        return None
    pickled = file.suffix == ".bin"
    tensors = torch.load(file, weights_only=True) if pickled else load_file(file)
    if (said := change(tensors, rng.choice(sorted(tensors)))) is None:
        return None
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    torch.save(tensors, file) if pickled else save_file(tensors, file, {"format": "pt"})
    return f"{file.name}: {said}"
