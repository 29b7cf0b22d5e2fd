"""What is refused of a model's folder before a library trusts it: one line that names file, value and rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.quantizers import AutoQuantizationConfig

from pesc.config import MODEL_TYPE
from pesc.crafting.families import MOE_FIELDS
from pesc.storage.checksums import SMALL, check_checksums
from pesc.storage.files import read_json, refuse_large_text

_NONSENSE = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
BAD_CONFIG = (StrictDataclassError, *_NONSENSE, ValueError)
"""What transformers and peft raise on settings that make no sense."""
_MOST = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1000) | dict.fromkeys(
    MOE_FIELDS, 4096
)
"""Larger counts are damage, and would take minutes to build, even on the meta device."""
_MOST_OF_ALL = 2**63 - 1
"""torch computes with no larger integer."""
_TEXTS = (".json", ".jinja", ".txt", ".model")


@contextmanager
def refused_in_one_line(fault: str) -> Iterator[None]:
    """Inside the block, what other libraries raise on nonsense becomes a ValueError of one line.

    Args:
        fault: the beginning of that line: what is wrong, and in which file.
    """
    try:
        yield
    except (*BAD_CONFIG, OSError) as error:
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{fault}: {kind}{' '.join(str(error).split())[:1000]}") from error


def sound_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json, when nothing in the folder's small files speaks against the model.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: a file is damaged, is not as it was written, or would make transformers load another model.
    """
    for text in (file for file in folder.iterdir() if file.suffix in _TEXTS and file.is_file()):
        refuse_large_text(text)
    file = folder / "config.json"
    values = read_json(file)
    check_checksums(folder, SMALL)
    refuse_absurd_numbers(values, file)
    _refuse_another_model(file, values)
    if (generation := folder / "generation_config.json").is_file():
        _refuse_bad_generation(generation)
    return values


def _refuse_another_model(file: Path, values: dict[str, Any]) -> None:
    model_type, ours = values.get("model_type"), [key for key in ("pesc", "base_model_type") if key in values]
    if ours and model_type != MODEL_TYPE:
        raise ValueError(f"{file}: model_type ({model_type!r}) must be {MODEL_TYPE!r}, as it has {' and '.join(ours)}")
    if "transformers_weights" in values:
        raise ValueError(f"{file}: transformers_weights must be left out: weights have the usual names here")
    if quantization := values.get("quantization_config"):
        with refused_in_one_line(f"{file}: transformers knows no such quantization_config"):
            AutoQuantizationConfig.from_dict(quantization)
    if (file.parent / "adapter_config.json").is_file():
        raise ValueError(
            f"{file.parent} holds an adapter_config.json beside config.json, so that transformers would load the model "
            "that it names: remove it, or merge that adapter"
        )


def _refuse_bad_generation(file: Path) -> None:
    values = read_json(file)
    ids = {key: value for key, value in values.items() if key.endswith("_token_id") and value is not None}
    for key, value in ids.items():
        if not all(type(each) is int and 0 <= each < 2**31 for each in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{file}: {key} ({str(value)[:50]}) must be a token's number, or a list of such")
    with refused_in_one_line(f"{file} cannot be read by transformers"):
        GenerationConfig.from_dict(values)


def refuse_absurd_numbers(values: dict[str, Any], file: Path) -> None:
    """Refuse settings that no model has: NaN, infinity, an epsilon that is not small, thousands of layers or experts.

    Args:
        values: the settings, nested as in JSON.
        file: where they stand, named in the error.

    Raises:
        ValueError: naming the first such setting.
    """
    places = [*values.items()]
    while places:
        key, value = places.pop()
        if isinstance(value, dict):
            places += value.items()
        elif isinstance(value, list):
            places += [(key, part) for part in value]
        elif isinstance(value, int) and abs(value) > (most := _MOST.get(key, _MOST_OF_ALL)):
            raise ValueError(f"{file}: {key} ({str(value)[:20]}) must be at most {most}: the file is damaged")
        # State-space models have an open range of this name.
        elif isinstance(value, float) and not math.isfinite(value) and key != "time_step_limit":
            raise ValueError(f"{file}: {key} ({value}) must be a finite number")
        elif isinstance(value, float | int) and key.endswith(("_eps", "_epsilon")) and not 0 < value < 1:
            raise ValueError(f"{file}: {key} ({value}) must be above 0 and below 1")
        elif isinstance(value, float | int) and key in ("rope_theta", "max_position_embeddings") and value <= 0:
            raise ValueError(f"{file}: {key} ({value}) must be above 0")
