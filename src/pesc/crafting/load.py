"""Find and load models by name: a folder, a hub id, or the embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pesc.config import PescConfig
from pesc.crafting.adapter import ADAPTER_JSON, load_adapter_weights, read_settings
from pesc.crafting.craft import craft
from pesc.crafting.lora import add_lora
from pesc.crafting.sources import resolve
from pesc.crafting.surgery import crafted_ffns
from pesc.storage.files import read_json
from pesc.storage.weights import weights_hash


def load_config(model: str | Path) -> Any:
    """The transformers config of a model, dense or crafted.

    Raises:
        FileNotFoundError, ValueError: as `resolve` and `read_json` do, and for types that transformers does not know.
    """
    folder = resolve(model)
    read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is no config that transformers can read: {error}") from error
    config.name_or_path = str(model)
    return config


def load_model(model: str | Path, *, dtype: str | torch.dtype = "auto", **kwargs: Any) -> PreTrainedModel:
    """Load a causal LM, dense or crafted, by folder, hub id or the embedded name.

    Args:
        model: see `resolve`.
        dtype: "auto" for the checkpoint's own.
        kwargs: passed to transformers' `from_pretrained` (`device_map`, `quantization_config`, …).

    Returns:
        The model in eval mode; its `config.name_or_path` is the name it was asked for by.

    Raises:
        FileNotFoundError, ValueError: when it is not there, or not whole.
    """
    folder = resolve(model)
    read_json(folder / "config.json")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
    except OSError as error:
        raise FileNotFoundError(f"{folder}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if "safetensor" in type(error).__name__.lower():
            raise ValueError(f"{folder}: a weight file is damaged or cut short ({error}); download it again") from error
        raise
    loaded.config.name_or_path = str(model)
    return loaded.eval()


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder, padding set for training and generation.

    Raises:
        FileNotFoundError: when the model has none.
    """
    folder = resolve(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{folder} holds no tokenizer that transformers can load ({error})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
