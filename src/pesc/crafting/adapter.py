"""The adapter folder: LoRA and experts of a tuned model in one small folder, without its base.

adapter.safetensors   every LoRA, router and expert tensor, once, under the name it has in the model
adapter.json          the base by name and hash, the method's settings, the LoRA's settings
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pesc.crafting.lora import LORA_NAME, adapter_tensors
from pesc.crafting.sources import resolve
from pesc.crafting.surgery import crafted_ffns
from pesc.storage.compare import shape_mismatches
from pesc.storage.files import new_folder, read_json
from pesc.storage.weights import read_tensors, weights_hash

ADAPTER_JSON = "adapter.json"


ADAPTER_WEIGHTS = "adapter.safetensors"


def save_adapter(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write a model's adapter folder.

    Args:
        model: tuned, with LoRA, experts or both; `config.name_or_path` names its base.
        folder: must not exist yet.

    Returns:
        `folder`.

    Raises:
        FileExistsError: when `folder` is there already.
        FileNotFoundError: when the base, whose weights are hashed, is not there.
        ValueError: when the model has neither LoRA nor experts, or LoRA under another name than "default".
    """
    with new_folder(Path(folder).expanduser()) as partial:
        write_adapter(model, partial)
    return Path(folder).expanduser()


def write_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the two files of an adapter folder into a folder that is there; see `save_adapter`."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} wraps the model: give LoRA to the model itself with pesc.add_lora(model, config)"
        )
    tensors = {name: p.detach().contiguous() for name, p in adapter_tensors(model).items()}
    if not tensors:
        raise ValueError(f"{type(model).__name__} has neither LoRA nor experts: there is no adapter to save")
    loras = getattr(model, "peft_config", {})
    if set(loras) - {LORA_NAME}:
        raise ValueError(f"LoRA adapters {sorted(loras)} must be one, named {LORA_NAME!r}, as pesc.add_lora makes it")
    base = model.config.name_or_path
    if not base:
        raise ValueError("the model was not loaded from anywhere: save its base and set model.config.name_or_path")
    settings = {
        "base_model": str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base,
        "base_sha256": weights_hash(resolve(base)),
        "pesc": model.config.method.to_dict() if crafted_ffns(model) else None,
        "lora": _lora_settings(loras[LORA_NAME]) if loras else None,
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    (folder / ADAPTER_JSON).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """What adapter.json says: base_model, base_sha256, pesc, lora.

    Raises:
        FileNotFoundError, ValueError: when it is not there, or not whole.
    """
    settings = read_json(folder / ADAPTER_JSON)
    missing = [key for key in ("base_model", "base_sha256", "pesc", "lora") if key not in settings]
    if missing or not isinstance(settings["base_model"], str):
        raise ValueError(f"{folder / ADAPTER_JSON} lacks {', '.join(missing) or 'the name of its base'}: it is damaged")
    return settings


def load_adapter_weights(model: PreTrainedModel, folder: Path) -> None:
    """Read an adapter folder's tensors into a model that already has LoRA and experts, strictly.

    Raises:
        ValueError: listing every missing, unexpected and misshapen tensor.
    """
    expected, found = adapter_tensors(model), read_tensors(folder / ADAPTER_WEIGHTS)
    shapes, found_shapes = ({name: t.shape for name, t in tensors.items()} for tensors in (expected, found))
    if lines := shape_mismatches(shapes, found_shapes, "in the model"):
        listed = "\n".join(f"  {line}" for line in lines)
        raise ValueError(f"{folder} does not fit its base and settings:\n{listed}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(found[name])


def _lora_settings(lora: LoraConfig) -> dict[str, Any]:
    default = LoraConfig().to_dict()
    changed = {key: value for key, value in lora.to_dict().items() if value != default.get(key)}
    changed.pop("base_model_name_or_path", None)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in changed.items()}
