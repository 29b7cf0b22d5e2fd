"""What a dense model's family looks like from outside: its decoder layers and their FFNs, found by structure."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pesc.config import MODEL_TYPE

MOE_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LinearShape = Callable[[nn.Module], tuple[int, int] | None]
"""(inputs, outputs) of a linear map; None for every other module."""


def find_ffns(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The dense FFN of every decoder layer, in order, found by its structure and not by its family's name.

    Args:
        model: a dense causal LM; its config gives `hidden_size` and `num_hidden_layers`.

    Returns:
        (name in `model.named_modules()`, module) for each layer.

    Raises:
        ValueError: for a model that is already a Mixture of Experts, and for one without such FFNs, and names what
            was searched for and found.
    """
    config = model.config
    count, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(count, int) or not isinstance(hidden, int):
        raise ValueError(
            f"{type(config).__name__} must have num_hidden_layers and hidden_size to find FFNs by (found {count!r} and "
            f"{hidden!r}); of a model with a vision or audio part, craft the language model alone"
        )
    layers_name, layers = decoder_layers(model, count)
    found = []
    for index, layer in enumerate(layers):
        name = ffn_name(layer, f"{layers_name}.{index}", hidden)
        ffn = layer.get_submodule(name)
        if any(parameter.dim() > 2 for parameter in ffn.parameters()):
            raise ValueError(
                f"{layers_name}.{index}.{name} ({type(ffn).__name__}) holds stacked weights: the model is already "
                "a Mixture of Experts, and only dense models can be crafted"
            )
        found.append((f"{layers_name}.{index}.{name}", ffn))
    return found


def decoder_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """(name, list) of a model's `count` decoder layers.

    Raises:
        ValueError: the model has no list of that length; the lists that it has are named.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in lists:
        if len(module) == count:
            return name, module
    raise ValueError(
        f"{type(model).__name__}: searched for a ModuleList of num_hidden_layers ({count}) decoder layers; found "
        + (", ".join(f"{name} ({len(module)})" for name, module in lists) or "none")
    )


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """The shape of torch's and transformers' linear maps."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def ffn_name(
    layer: nn.Module,
    path: str,
    hidden_size: int,
    *,
    linear_shape: LinearShape = linear_shape,
    attention: tuple[type, ...] = (),
) -> str:
    """The name of a decoder layer's FFN.

    An FFN is the one child that holds linear maps from and to the hidden size and whose forward takes the hidden
    states alone.

    Args:
        layer: the decoder layer.
        path: its name in the model, for the error.
        hidden_size: D.
        linear_shape: recognises linear maps.
        attention: classes; a child that holds one of them is no FFN.

    Raises:
        ValueError: no child fits, or several do; all children are named.
    """
    children = {name: (child, _forward_parameters(child)) for name, child in layer.named_children()}
    fitting = []
    for name, (child, taken) in children.items():
        if any(isinstance(module, attention) for module in child.modules()):
            continue
        shapes = [shape for module in child.modules() if (shape := linear_shape(module)) is not None]
        reads = any(inputs == hidden_size for inputs, _ in shapes)
        writes = any(outputs == hidden_size for _, outputs in shapes)
        if len(shapes) >= 2 and reads and writes and len(taken) == 1:
            fitting.append(name)
    if len(fitting) == 1:
        return fitting[0]
    found = [
        f"{name} ({type(child).__name__}, forward takes {', '.join(taken) or 'nothing'})"
        for name, (child, taken) in children.items()
    ]
    raise ValueError(
        f"searched {path} ({type(layer).__name__}) for one child with linear maps from and to hidden_size "
        f"({hidden_size}) whose forward takes the hidden states alone; {len(fitting)} fit"
        f"{' (' + ', '.join(fitting) + ')' if fitting else ''}. Found: {'; '.join(found)}"
    )


def refuse_moe(config: Any) -> None:
    """Refuse a transformers config of a model that has experts already.

    Raises:
        ValueError: naming the field that says so.
    """
    if config.model_type == MODEL_TYPE:
        raise ValueError(f"the model is already crafted (model_type {MODEL_TYPE!r}): craft its dense base instead")
    for field in MOE_FIELDS:
        count = getattr(config, field, None)
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"the model is already a Mixture of Experts ({config.model_type}: {field} = {count}), "
                "and only dense models can be crafted"
            )


def _forward_parameters(module: nn.Module) -> list[str]:
    catch_all = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, p in inspect.signature(module.forward).parameters.items() if p.kind not in catch_all]
