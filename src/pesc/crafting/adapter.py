"""The adapter folder: LoRA and experts of a tuned model in one small folder, without its base.

adapter.safetensors   every LoRA, router and expert tensor, once, under the name it has in the model
adapter.json          the base by name and hash, the method's settings, the LoRA's settings
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pesc.config import PescConfig
from pesc.crafting.lora import LORA_NAME, adapter_tensors
from pesc.crafting.skeleton import refuse_absurd_numbers
from pesc.crafting.sources import resolve
from pesc.crafting.surgery import crafted_ffns
from pesc.storage.compare import compare_tensors
from pesc.storage.files import new_folder, read_json, write_json
from pesc.storage.weights import Weights, weights_hash

ADAPTER = "adapter"
"""The adapter folder's name in a run and in a checkpoint of one."""
ADAPTER_JSON, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"


@dataclass(frozen=True)
class AdapterSettings:
    """What adapter.json says."""

    base_model: str
    """A folder, a hub id, or the embedded model's name."""
    base_sha256: str
    """Of the base's weight files, as `weights_hash` computes it."""
    pesc: PescConfig | None
    """The experts; None for a dense model tuned with LoRA alone."""
    lora: dict[str, Any] | None
    """peft's settings that differ from its defaults."""

    @classmethod
    def read(cls, folder: Path) -> AdapterSettings:
        """Read them from an adapter's folder.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: the file lacks a setting, or one breaks its rule.
        """
        path, values = folder / ADAPTER_JSON, read_json(folder / ADAPTER_JSON)
        refuse_absurd_numbers(values, path)
        kinds = {"base_model": str, "base_sha256": str, "pesc": dict | None, "lora": dict | None}
        if missing := [key for key in kinds if key not in values]:
            raise ValueError(f"{path} lacks {', '.join(missing)}: it is damaged")
        wrong = [f"{key} ({values[key]!r})" for key, kind in kinds.items() if not isinstance(values[key], kind)]
        if wrong:
            raise ValueError(f"{path}: {', '.join(wrong)} must be of another type: it is damaged")
        pesc_config = None if values["pesc"] is None else PescConfig.from_dict(values["pesc"])
        return cls(values["base_model"], values["base_sha256"], pesc_config, values["lora"])

    @classmethod
    def of(cls, model: PreTrainedModel) -> AdapterSettings:
        """Those of a tuned model.

        Raises:
            FileNotFoundError: the base, whose weights are hashed, is not there.
            ValueError: the model's LoRA is not the one of `add_lora`, or the model has no named base.
        """
        loras = getattr(model, "peft_config", {})
        if set(loras) - {LORA_NAME}:
            raise ValueError(
                f"LoRA adapters {sorted(loras)} must be one, named {LORA_NAME!r}, as pesc.add_lora makes it"
            )
        base = model.config.name_or_path
        if not base:
            raise ValueError("the model was not loaded from anywhere: save its base and set model.config.name_or_path")
        folder = resolve(base)
        return cls(
            base_model=str(folder.resolve()) if folder == Path(base).expanduser() else base,
            base_sha256=weights_hash(folder),
            pesc=model.config.pesc_config if crafted_ffns(model) else None,
            lora=_lora_settings(loras[LORA_NAME]) if loras else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"pesc": self.pesc.to_dict() if self.pesc else None}


def save_adapter(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write a model's adapter folder.

    Args:
        model: tuned, with LoRA, experts or both; `config.name_or_path` names its base.
        folder: must not exist yet.

    Returns:
        `folder`.

    Raises:
        FileExistsError: `folder` is there already.
        FileNotFoundError: the base, whose weights are hashed, is not there.
        ValueError: the model has neither LoRA nor experts, or LoRA under another name than "default".
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
    settings = AdapterSettings.of(model)
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    write_json(folder / ADAPTER_JSON, settings.to_dict(), sort_keys=True)


def adapter_weights(folder: Path) -> Weights:
    """The tensors of an adapter folder.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the file is damaged or truncated.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {ADAPTER_WEIGHTS}: the folder is not complete")
    return Weights(folder, [file])


def load_adapter_weights(model: PreTrainedModel, folder: Path) -> None:
    """Read an adapter folder's tensors into a model that already has LoRA and experts, strictly.

    Raises:
        FileNotFoundError, ValueError: as `adapter_weights` does.
        ValueError: listing every missing, unexpected and misshapen tensor.
    """
    expected, weights = adapter_tensors(model), adapter_weights(folder)
    differences = compare_tensors({name: p.shape for name, p in expected.items()}, weights.shapes)
    differences.refuse(f"{folder} does not fit its base and settings", "in the model")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights.read(name))


def _lora_settings(lora: LoraConfig) -> dict[str, Any]:
    default = LoraConfig().to_dict()
    changed = {key: value for key, value in lora.to_dict().items() if value != default.get(key)}
    changed.pop("base_model_name_or_path", None)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in changed.items()}
