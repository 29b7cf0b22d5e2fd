"""A model without memory: the names and shapes that a config describes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming


def skeleton_of(config: Any) -> Any:
    """The model of a config on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tied_names(skeleton: Any) -> set[str]:
    """Names of a model's tensors that stand for another one."""
    return set(getattr(skeleton, "all_tied_weights_keys", None) or {})


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The name in the model of each tensor of a checkpoint: another one where transformers renames weights."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    found = {}
    for name in names:
        found[name] = name
        for rule in renamings:
            found[name], _ = rule.rename_source_key(found[name])
    return found
