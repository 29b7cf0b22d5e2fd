"""A model without memory: the names and shapes that a config describes, and how files differ from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from pesc.storage.compare import TensorDifferences, compare_tensors
from pesc.storage.weights import Weights

_NONSENSE = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
BAD_CONFIG = (StrictDataclassError, *_NONSENSE, ValueError)
"""What transformers and peft raise on settings that make no sense."""
_PARAMETERS_A_BYTE = 8
"""More than any quantization packs."""
_MOST_LAYERS = 1000
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


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


def refuse_too_many_layers(values: dict[str, Any]) -> None:
    """Refuse the content of a config.json with so many layers that building them on the meta device takes minutes.

    Raises:
        ValueError: there are more than `_MOST_LAYERS`.
    """
    for key in _LAYER_COUNTS:
        if isinstance(count := values.get(key), int) and count > _MOST_LAYERS:
            raise ValueError(f"{key} ({str(count)[:20]}) must be at most {_MOST_LAYERS}: the config is damaged")


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


def converts_weights(skeleton: Any) -> bool:
    """Whether transformers makes a model's tensors from others in the files: stacked experts, quantized weights."""
    rules = get_model_conversion_mapping(skeleton)
    quantized = getattr(skeleton.config, "quantization_config", None)
    return bool(quantized) or not all(isinstance(rule, WeightRenaming) for rule in rules)


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
    differences = compare_tensors(expected, found)
    size, promised = sum(weights.file_sizes), skeleton.num_parameters()
    if promised > _PARAMETERS_A_BYTE * size:
        differences.others.append(f"too small: files of {size} bytes for a model of {promised} parameters")
    if not getattr(skeleton.config, "quantization_config", None):
        # Buffers may hold integers; what is computed with may not.
        differences.others += weights.not_floating(
            name for name, known in in_model.items() if known in shapes or name.endswith("weight")
        )
    return differences
