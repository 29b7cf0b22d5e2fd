"""The adapter folder: LoRA and experts of a tuned model in one small folder, without its base.

adapter.safetensors   every LoRA, router and expert tensor, once, under the name it has in the model
adapter.json          the base by name and hashes, the method's settings, the LoRA's settings
SHA256SUMS            hashes of the two
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pesc.config import PescConfig
from pesc.crafting.lora import LORA_NAME, adapter_tensors, refuse_unsavable
from pesc.crafting.refusals import refuse_absurd_numbers, refused_in_one_line
from pesc.crafting.sources import resolve
from pesc.crafting.surgery import crafted_ffns
from pesc.storage.checksums import write_checksums
from pesc.storage.compare import TensorDifferences, compare_tensors
from pesc.storage.files import json_sha256, new_folder, read_json, write_json
from pesc.storage.weights import Weights, weights_hash

ADAPTER = "adapter"
"""The adapter folder's name in a run and in a checkpoint of one."""
ADAPTER_JSON, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"
_COSMETIC = ("_name_or_path", "architectures", "auto_map", "transformers_version")


@dataclass(frozen=True)
class AdapterSettings:
    """What adapter.json says."""

    base_model: str
    """A folder, a hub id, or the embedded model's name."""
    base_sha256: str
    """Of the base's weight files, as `weights_hash` computes it."""
    base_config_sha256: str
    """Of the base's config.json, as `config_hash` computes it."""
    pesc: PescConfig | None
    """The experts; None for a dense model tuned with LoRA alone."""
    lora: dict[str, Any] | None
    """peft's settings that differ from its defaults."""
    chat_template: str | None = None
    """What it was trained with; None means the base tokenizer's own."""

    @classmethod
    def read(cls, folder: Path) -> AdapterSettings:
        """Read them from an adapter's folder.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: the file lacks a setting, or one breaks its rule.
        """
        path, values = folder / ADAPTER_JSON, read_json(folder / ADAPTER_JSON)
        refuse_absurd_numbers(values, path)
        kinds: dict[str, Any] = dict.fromkeys(("base_model", "base_sha256", "base_config_sha256"), str)
        kinds |= dict.fromkeys(("pesc", "lora"), dict | None) | {"chat_template": str | None}
        if missing := [key for key in kinds if key not in values]:
            raise ValueError(f"{path} lacks {', '.join(missing)}: it is damaged, or of an older version of pesc")
        wrong = [f"{key} ({values[key]!r})" for key, kind in kinds.items() if not isinstance(values[key], kind)]
        if wrong:
            raise ValueError(f"{path}: {', '.join(wrong)} must be of another type: it is damaged")
        with refused_in_one_line(str(path)):
            if patterns := _patterns(values["lora"] or {}):
                raise ValueError(f"lora: {', '.join(patterns)} must be names of modules, not regular expressions")
            LoraConfig(**values["lora"] or {})
            pesc_config = None if values["pesc"] is None else PescConfig.from_dict(values["pesc"])
        return cls(**{key: values[key] for key in kinds} | {"pesc": pesc_config})

    @classmethod
    def of(cls, model: PreTrainedModel, chat_template: str | None = None) -> AdapterSettings:
        """Those of a tuned model.

        Raises:
            FileNotFoundError: the base, whose weights are hashed, is not there.
            ValueError: the model's LoRA is not the one of `add_lora`, or the model has no named base.
        """
        loras = getattr(model, "peft_config", {})
        for name, lora in loras.items():
            refuse_unsavable(lora, name)
        base = base_of(model)
        folder = resolve(base)
        return cls(
            base_model=str(folder.resolve()) if folder == Path(base).expanduser() else base,
            base_sha256=weights_hash(folder),
            base_config_sha256=config_hash(folder),
            pesc=model.config.pesc_config if crafted_ffns(model) else None,
            lora=_lora_settings(loras[LORA_NAME], model) if loras else None,
            chat_template=chat_template,
        )

    def check_base(self, folder: Path) -> None:
        """Compare a folder with the base that the adapter was trained on, by their hashes.

        Raises:
            FileNotFoundError: the folder holds no model.
            ValueError: its weights or its config are others.
        """
        for what, wanted, hash_of in (
            ("weights", self.base_sha256, weights_hash),
            ("config.json", self.base_config_sha256, config_hash),
        ):
            if (found := hash_of(folder)) != wanted:
                raise ValueError(
                    f"{folder} is another base: the adapter was trained on {self.base_model} with {what} of sha256 "
                    f"{wanted[:12]}…, not {found[:12]}…; it needs the {what} it was trained on"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"pesc": self.pesc.to_dict() if self.pesc else None}


def base_of(model: PreTrainedModel) -> str:
    """The place of a tuned model's base.

    Raises:
        ValueError: the model was not loaded from anywhere.
    """
    base: str = getattr(model, "adapter_base", model.config.name_or_path)
    if not base:
        raise ValueError("the model was not loaded from anywhere: save its base and set model.config.name_or_path")
    return base


def save_adapter(model: PreTrainedModel, folder: str | Path, *, chat_template: str | None = None) -> Path:
    """Write a model's adapter folder.

    Args:
        model: tuned, with LoRA, experts or both; `config.name_or_path` names its base.
        folder: must not exist yet.
        chat_template: what it was trained with, if that is not the base tokenizer's own.

    Returns:
        `folder`.

    Raises:
        FileExistsError: `folder` is there already.
        FileNotFoundError: the base, whose weights are hashed, is not there.
        ValueError: the model has neither LoRA nor experts, or LoRA under another name than "default".
    """
    with new_folder(Path(folder).expanduser()) as partial:
        write_adapter(model, partial, chat_template)
    return Path(folder).expanduser()


def write_adapter(model: PreTrainedModel, folder: Path, chat_template: str | None = None) -> None:
    """Write an adapter folder's files into a folder that is there; see `save_adapter`."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} wraps the model: give LoRA to the model itself with pesc.add_lora(model, config)"
        )
    tensors = {name: p.detach().contiguous() for name, p in adapter_tensors(model).items()}
    if not tensors:
        raise ValueError(f"{type(model).__name__} has neither LoRA nor experts: there is no adapter to save")
    settings = AdapterSettings.of(model, chat_template)
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    write_json(folder / ADAPTER_JSON, settings.to_dict(), sort_keys=True)
    write_checksums(folder, [ADAPTER_JSON, ADAPTER_WEIGHTS])


def config_hash(folder: Path) -> str:
    """SHA-256 of what a model's config.json says of the computation: not of how it is written, or by whom.

    Raises:
        FileNotFoundError, ValueError: as `read_json` does.
    """
    values = {key: value for key, value in read_json(folder / "config.json").items() if key not in _COSMETIC}
    if "torch_dtype" in values:
        values.setdefault("dtype", values.pop("torch_dtype"))
    return json_sha256(values)


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
    weights = adapter_weights(folder)
    adapter_differences(model, weights).refuse(f"{folder} does not fit its base and settings", "in the model")
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            parameter.copy_(weights.read(name))


def adapter_differences(model: PreTrainedModel, weights: Weights) -> TensorDifferences:
    """How an adapter's tensors differ from those of a model with its LoRA and experts."""
    differences = compare_tensors({name: p.shape for name, p in adapter_tensors(model).items()}, weights.shapes)
    differences.others += weights.not_floating(weights.tensors)
    return differences


def _lora_settings(lora: LoraConfig, model: PreTrainedModel) -> dict[str, Any]:
    default = LoraConfig().to_dict()
    changed = {key: value for key, value in lora.to_dict().items() if value != default.get(key)}
    changed.pop("base_model_name_or_path", None)
    if _patterns(changed):
        changed = {key: value for key, value in changed.items() if key not in _SELECTORS} | _exact(model, lora)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in changed.items()}


_PATTERNS = ("layers_pattern", "rank_pattern", "alpha_pattern")
_SELECTORS = ("target_modules", "exclude_modules", "layers_to_transform", *_PATTERNS)


def _patterns(lora: dict[str, Any]) -> list[str]:
    """Names of the settings that peft would match as regular expressions, which may take for ever."""
    texts: dict[str, Any] = {name: lora.get(name) or () for name in _SELECTORS}
    return [
        name
        for name, value in texts.items()
        if (isinstance(value, str) and value != "all-linear")
        or (name in _PATTERNS and any(not re.fullmatch(r"[\w.]+", str(key)) for key in value))
    ]


def _exact(model: PreTrainedModel, lora: LoraConfig) -> dict[str, Any]:
    """The settings that choose the same modules by their full names."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    ranks = {name: module.r[LORA_NAME] for name, module in modules.items()}
    alphas = {name: module.lora_alpha[LORA_NAME] for name, module in modules.items()}
    return {
        "target_modules": set(modules),
        "rank_pattern": {name: r for name, r in ranks.items() if r != lora.r},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != lora.lora_alpha},
    }
