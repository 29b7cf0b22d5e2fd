"""What a dense model's family looks like from outside: its decoder layers and their FFNs, found by structure."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

MOE_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def find_ffns(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The dense FFN of every decoder layer, in order, found by what it is and not by its family's name.

    An FFN is the one child of a decoder layer that holds linear maps from and to the hidden size and whose forward
    takes the hidden states alone.

    Args:
        model: a dense causal LM; its config gives `hidden_size` and `num_hidden_layers`.

    Returns:
        (name in `model.named_modules()`, module) for each layer.

    Raises:
        ValueError: for a model that is already a Mixture of Experts, and for one without such FFNs, with what was
            looked for and what was found.
    """
    layers_name, layers = _decoder_layers(model)
    found = []
    for index, layer in enumerate(layers):
        names = [name for name, child in layer.named_children() if _is_ffn(child, model.config.hidden_size)]
        if len(names) != 1:
            raise ValueError(_no_ffn_message(model, f"{layers_name}.{index}", layer, names))
        ffn = layer.get_submodule(names[0])
        if any(parameter.dim() > 2 for parameter in ffn.parameters()):
            raise ValueError(
                f"{layers_name}.{index}.{names[0]} ({type(ffn).__name__}) holds stacked weights: the model is already "
                "a Mixture of Experts, and only dense models can be crafted"
            )
        found.append((f"{layers_name}.{index}.{names[0]}", ffn))
    return found


def refuse_moe(config: Any) -> None:
    """Refuse a transformers config of a model that has experts already.

    Raises:
        ValueError: naming the field that says so.
    """
    if config.model_type == "pesc":
        raise ValueError("the model is already crafted (model_type 'pesc'): craft its dense base instead")
    for field in MOE_FIELDS:
        count = getattr(config, field, None)
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"the model is already a Mixture of Experts ({config.model_type}: {field} = {count}), "
                "and only dense models can be crafted"
            )


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    config = model.config
    count, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(count, int) or not isinstance(hidden, int):
        raise ValueError(
            f"{type(config).__name__} must have num_hidden_layers and hidden_size to find FFNs by (found {count!r} and "
            f"{hidden!r}); of a model with a vision or audio part, craft the language model alone"
        )
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in lists:
        if len(module) == count:
            return name, module
    raise ValueError(
        f"{type(model).__name__}: looked for a ModuleList of num_hidden_layers ({count}) decoder layers; found "
        + (", ".join(f"{name} ({len(module)})" for name, module in lists) or "none")
    )


def _is_ffn(module: nn.Module, hidden_size: int) -> bool:
    shapes = [shape for child in module.modules() if (shape := _linear_shape(child)) is not None]
    reads = any(inputs == hidden_size for inputs, _ in shapes)
    writes = any(outputs == hidden_size for _, outputs in shapes)
    return len(shapes) >= 2 and reads and writes and len(_forward_parameters(module)) == 1


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _forward_parameters(module: nn.Module) -> list[str]:
    catch_all = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, p in inspect.signature(module.forward).parameters.items() if p.kind not in catch_all]


def _no_ffn_message(model: PreTrainedModel, layer_name: str, layer: nn.Module, names: list[str]) -> str:
    children = [
        f"{name} ({type(child).__name__}, forward takes {', '.join(_forward_parameters(child)) or 'nothing'})"
        for name, child in layer.named_children()
    ]
    return (
        f"{type(model).__name__}: looked in {layer_name} for one child with linear maps from and to hidden_size "
        f"({model.config.hidden_size}) whose forward takes the hidden states alone; {len(names)} fit"
        f"{' (' + ', '.join(names) + ')' if names else ''}. Found: {'; '.join(children)}"
    )
