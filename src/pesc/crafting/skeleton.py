"""A model without memory: the names and shapes that a config describes, and how files differ from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from pesc.storage.compare import TensorDifferences, compare_tensors
from pesc.storage.weights import Weights

BAD_CONFIG = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)
"""What transformers raises on values of a config that make no sense."""


def skeleton_of(config: Any) -> Any:
    """The model of a config on the meta device.

    Raises:
        ValueError: transformers cannot build a causal LM from the config, or only with code of a hub.
    """
    refuse_hub_code(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except BAD_CONFIG as error:
        raise ValueError(f"no model can be built from the config: {error}") from error


def refuse_hub_code(config: Any) -> None:
    """Raise ValueError for a config whose attention is compiled code, which transformers would fetch and run."""
    if "/" in str(config._attn_implementation):
        raise ValueError(
            f"attn_implementation ({config._attn_implementation}) names compiled code of a hub, which is never run: "
            "remove it from config.json"
        )


def tied_names(skeleton: Any) -> set[str]:
    """Names of a model's tensors that stand for another one; files may leave them out."""
    return set(getattr(skeleton, "all_tied_weights_keys", None) or {})


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The name in the model of each tensor of a checkpoint: another one if transformers renames it."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    found = {}
    for name in names:
        found[name] = name
        for rule in renamings:
            found[name], _ = rule.rename_source_key(found[name])
    return found


def differences_from(skeleton: Any, weights: Weights, *, new: Iterable[str] = ()) -> TensorDifferences:
    """How the tensors of files differ from those of a model, by their names in the model.

    Args:
        skeleton: the model.
        weights: the files.
        new: names that the files need not hold.
    """
    in_model = names_in_model(skeleton, weights.tensors)
    found = {in_model[name]: shape for name, shape in weights.shapes.items()}
    optional = tied_names(skeleton) | set(new)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    expected = {name: shape for name, shape in shapes.items() if name in found or name not in optional}
    return compare_tensors(expected, found)
