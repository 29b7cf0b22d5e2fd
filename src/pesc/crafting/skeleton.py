"""A model without memory: the names and shapes that a config describes, and how files differ from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from pesc.crafting.families import MOE_FIELDS
from pesc.storage.compare import TensorDifferences, compare_tensors
from pesc.storage.weights import Weights

_NONSENSE = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
BAD_CONFIG = (StrictDataclassError, *_NONSENSE, ValueError)
"""What transformers and peft raise on settings that make no sense."""
_PARAMETERS_A_BYTE = 8
"""More than any quantization packs."""
_MOST = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1000) | dict.fromkeys(
    MOE_FIELDS, 4096
)
"""Larger counts are damage, and would take minutes to build, even on the meta device."""
_MOST_OF_ALL = 2**63 - 1
"""torch computes with no larger integer."""


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


def skeleton_of(config: Any) -> Any:
    """The model of a config on the meta device.

    Raises:
        ValueError: transformers cannot build a causal LM from the config.
    """
    whose = f" of {config.name_or_path}" if config.name_or_path else ""
    with refused_in_one_line(f"no model can be built from the config{whose}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tied_names(skeleton: Any) -> set[str]:
    """Names of a model's tensors that stand for another one; files may leave them out."""
    return set(getattr(skeleton, "all_tied_weights_keys", None) or {})


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The name in the model of each tensor of a checkpoint: another one if transformers renames it."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    found, known = {}, model.state_dict().keys()
    for name in names:
        renamed = name
        for rule in renamings:
            renamed, _ = rule.rename_source_key(renamed)
        # A file that was saved from the backbone alone does not know the backbone's name.
        prefixed = f"{model.base_model_prefix}.{renamed}"
        found[name] = prefixed if prefixed in known else renamed
    return found


def shapes_in_files(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name in a checkpoint; experts that a model stacks lie apart there."""
    tensors = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def differences_from(skeleton: Any, weights: Weights, *, new: Iterable[str] = ()) -> TensorDifferences:
    """How the tensors of files differ from those of a model, by their names in the files.

    Args:
        skeleton: the model.
        weights: the files.
        new: names in the model that the files need not hold.
    """
    promised = shapes_in_files(skeleton)
    in_model = names_in_model(skeleton, weights.tensors | promised)
    in_files = {in_model[name]: name for name in weights.tensors}
    optional = (tied_names(skeleton) | set(new)) - in_files.keys()
    expected = {
        in_files.get(in_model[name], name): shape for name, shape in promised.items() if in_model[name] not in optional
    }
    differences = compare_tensors(expected, weights.shapes)
    size, parameters = sum(weights.file_sizes), skeleton.num_parameters()
    if parameters > _PARAMETERS_A_BYTE * size:
        differences.others.append(f"too small: files of {size} bytes for a model of {parameters} parameters")
    if not getattr(skeleton.config, "quantization_config", None):
        # Buffers may hold integers; what is computed with may not.
        differences.others += weights.not_floating(
            name for name in weights.tensors if name in expected or name.endswith("weight")
        )
    return differences


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
        elif isinstance(value, float | int) and key == "rope_theta" and value <= 0:
            raise ValueError(f"{file}: {key} ({value}) must be above 0")
