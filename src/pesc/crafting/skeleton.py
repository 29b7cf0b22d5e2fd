"""A model without memory: the names and shapes that a config describes, and how files differ from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from pesc.storage.compare import TensorDifferences, compare_tensors
from pesc.storage.weights import Weights

BAD_CONFIG = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)
"""What transformers raises on values of a config that make no sense."""


def skeleton_of(config: Any) -> Any:
    """The model of a config on the meta device.

    Raises:
        ValueError: transformers cannot build a causal LM from the config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except BAD_CONFIG as error:
        raise ValueError(f"no model can be built from the config: {error}") from error


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
    return compare_tensors(expected, weights.shapes)


def refuse_absurd_numbers(values: dict[str, Any], file: Path) -> None:
    """Refuse settings with which a model computes NaN, or nothing: NaN, infinity, an epsilon that is not small.

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
        # State-space models have an open range of this name.
        elif isinstance(value, float) and not math.isfinite(value) and key != "time_step_limit":
            raise ValueError(f"{file}: {key} ({value}) must be a finite number")
        elif isinstance(value, float | int) and key.endswith(("_eps", "_epsilon")) and not 0 < value < 1:
            raise ValueError(f"{file}: {key} ({value}) must be above 0 and below 1")
        elif isinstance(value, float | int) and key == "rope_theta" and value <= 0:
            raise ValueError(f"{file}: {key} ({value}) must be above 0")
