"""A model without memory: the names and shapes that a config describes, and how files differ from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from pesc.crafting.refusals import refused_in_one_line
from pesc.storage.compare import TensorDifferences, compare_tensors
from pesc.storage.weights import Weights

_PARAMETERS_A_BYTE = 8
"""More than any quantization packs."""


def skeleton_of(config: Any) -> Any:
    """The model of a config on the meta device.

    Raises:
        ValueError: transformers cannot build a causal LM from the config, or only with code of a hub.
    """
    refuse_hub_code(config)
    whose = f" of {config.name_or_path}" if config.name_or_path else ""
    with refused_in_one_line(f"no model can be built from the config{whose}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


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
