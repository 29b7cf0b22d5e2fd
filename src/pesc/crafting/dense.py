"""Find and load models by name: a folder, a hub id, or the embedded default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pesc.crafting.embedded import EMBEDDED, embedded_folder

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def resolve(model: str | Path) -> Path:
    """The folder of a model.

    Args:
        model: a folder; a hub id, which is downloaded; or `EMBEDDED`, the model that `make setup` installs.

    Raises:
        FileNotFoundError: when there is no such folder, nor a hub model of that name within reach.
    """
    if str(model) == EMBEDDED:
        return embedded_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{model} is a file: give the model's folder")
    return _download(str(model))


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    way_out = f"give a folder with a config.json, a hub id such as org/name, or {EMBEDDED!r}"
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except HFValidationError as error:
        raise FileNotFoundError(f"{model}: no such folder, and no valid hub id; {way_out}") from error
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{model}: no such folder, and the hub did not provide it ({reason}); {way_out}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: when it is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: it is no model's folder, or not whole")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}): write or download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


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
