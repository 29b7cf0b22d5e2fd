"""The adapter folder: LoRA and experts of a tuned model in one small folder, without its base.

adapter.safetensors   every LoRA, router and expert tensor, once, under the name it has in the model
adapter.json          the base by name and hash, the method's settings, the LoRA's settings
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from pesc.config import PescConfig
from pesc.crafting.checkpoint import new_folder, read_weight_map, shape_mismatches
from pesc.crafting.craft import craft
from pesc.crafting.dense import load_model, read_json, resolve
from pesc.crafting.surgery import crafted_ffns, expert_parameters

ADAPTER_JSON = "adapter.json"
ADAPTER_WEIGHTS = "adapter.safetensors"
_LORA_NAME = "default"


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """Give a model LoRA and say what trains: LoRA, routers and experts; all else is frozen.

    LoRA itself is kept in float32, whatever the model's dtype: its steps are too small for less.

    Args:
        model: dense or crafted; changed in place.
        lora: peft's settings.

    Returns:
        The same model.

    Raises:
        ValueError: for settings that train more than LoRA, or LoRA on tied embeddings, which cannot be folded.
    """
    extra = {"modules_to_save": lora.modules_to_save, "trainable_token_indices": lora.trainable_token_indices}
    problems = [f"{name} must be left out" for name, value in extra.items() if value]
    if lora.bias != "none":
        problems.append(f"bias ({lora.bias!r}) must be 'none'")
    if problems:
        raise ValueError(f"add_lora: {'; '.join(problems)}: only LoRA, routers and experts train and are saved")
    model.add_adapter(lora, adapter_name=_LORA_NAME)
    tied = model.config.tie_word_embeddings and isinstance(model.get_input_embeddings(), LoraLayer)
    if tied or isinstance(model.get_output_embeddings(), LoraLayer):
        raise ValueError("add_lora: target_modules must not name the embeddings or the output layer")
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.float()
    train_experts(model)
    return model


def train_experts(model: PreTrainedModel) -> None:
    """Let routers and experts train, and beside them only what LoRA added."""
    trained = adapter_tensors(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def adapter_tensors(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What an adapter folder holds of a model: LoRA, router and expert parameters by name."""
    return expert_parameters(model) | lora_parameters(model)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What LoRA added to a model, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for key, parameter in module.named_parameters()
        if not key.startswith("base_layer.")
    }


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
    if set(loras) - {_LORA_NAME}:
        raise ValueError(f"LoRA adapters {sorted(loras)} must be one, named {_LORA_NAME!r}, as pesc.add_lora makes it")
    base = model.config.name_or_path
    if not base:
        raise ValueError("the model was not loaded from anywhere: save its base and set model.config.name_or_path")
    settings = {
        "base_model": str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base,
        "base_sha256": weights_hash(resolve(base)),
        "pesc": model.config.method.to_dict() if crafted_ffns(model) else None,
        "lora": _lora_settings(loras[_LORA_NAME]) if loras else None,
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


def load(
    path: str | Path, *, base: str | Path | None = None, dtype: str | torch.dtype = "auto", **kwargs: Any
) -> PreTrainedModel:
    """Load any model of this package with one call.

    Args:
        path: a run's folder, an adapter folder (its base is loaded and crafted first), a crafted or dense model's
            folder, a hub id, or the embedded default's name.
        base: where an adapter's base is now, if not where it was; its weights must be the same.
        dtype: of the base and the experts; "auto" for the base checkpoint's own.
        kwargs: passed to transformers' `from_pretrained` for the base.

    Returns:
        The model in eval mode. LoRA stays apart: `fold` merges it.

    Raises:
        FileNotFoundError: when the path or the base is not there.
        ValueError: when the base is not the one the adapter was trained on, or tensors are missing, unknown or
            misshapen; all of them are listed.
    """
    folder = find_adapter(path)
    if folder is None:
        return load_model(path, dtype=dtype, **kwargs)
    settings = read_settings(folder)
    base = _checked_base(folder, settings, base)
    model = load_model(base, dtype=dtype, **kwargs)
    if settings["pesc"] and not crafted_ffns(model):
        craft(model, PescConfig.from_dict(settings["pesc"]))
    if settings["lora"]:
        add_lora(model, LoraConfig(**settings["lora"]))
    load_adapter_weights(model, folder)
    return model.eval()


def _checked_base(folder: Path, settings: dict[str, Any], base: str | Path | None) -> str | Path:
    base = base or settings["base_model"]
    wanted = settings["base_sha256"]
    try:
        found = weights_hash(resolve(base))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} needs its base {base} (sha256 {wanted[:12]}…), which is not there: {error}; if it moved, say "
            "where: pesc.load(…, base=…)"
        ) from error
    if found != wanted:
        raise ValueError(
            f"{folder} was trained on {settings['base_model']} with weights of sha256 {wanted[:12]}…, but {base} now "
            f"has {found[:12]}…: it needs the weights it was trained on"
        )
    return base


def find_adapter(path: str | Path) -> Path | None:
    """The adapter folder that a path means: itself, or the `adapter` folder of a run; None where it is neither."""
    for folder in (Path(path).expanduser(), Path(path).expanduser() / "adapter"):
        if (folder / ADAPTER_JSON).is_file():
            return folder
    return None


def base_of(path: str | Path) -> str:
    """The name of the model that holds a path's tokenizer and dense weights: an adapter's base, or the path itself."""
    folder = find_adapter(path)
    return str(path) if folder is None else read_settings(folder)["base_model"]


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


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: when it is damaged or cut short.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {file.name}: the folder is not whole")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error})") from error


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """Merge LoRA into the dense weights, so that `save_pretrained` writes a standalone model.

    Experts cannot be merged: which of them act differs from token to token.

    Args:
        model: changed in place; without LoRA it is returned as it is.

    Returns:
        The same model, computing the same.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
        del model.peft_config
    return model


def weights_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights: its safetensors files' bytes, in the order of their names.

    Raises:
        FileNotFoundError, ValueError: as `read_weight_map` does.
    """
    files = sorted(set(read_weight_map(folder).values()))
    stamps = tuple((str(folder / file), (folder / file).stat().st_mtime_ns) for file in files)
    return _hash_files(stamps)


@functools.lru_cache
def _hash_files(stamps: tuple[tuple[str, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _ in stamps:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _lora_settings(lora: LoraConfig) -> dict[str, Any]:
    default = LoraConfig().to_dict()
    changed = {key: value for key, value in lora.to_dict().items() if value != default.get(key)}
    changed.pop("base_model_name_or_path", None)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in changed.items()}
