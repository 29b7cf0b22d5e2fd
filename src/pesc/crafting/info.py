"""What a model on disk is, read from its files without loading its dense weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pesc.crafting.cost import count_parameters
from pesc.crafting.load import locate, unexpected_experts
from pesc.crafting.surgery import expert_parameters
from pesc.storage.compare import TensorDifferences
from pesc.storage.weights import Weights


@dataclass
class ModelInfo:
    """A model's description."""

    path: str
    kind: str
    """"dense", "crafted" or "adapter"."""
    family: str
    """The dense model_type."""
    base_model: str | None
    """An adapter's base."""
    num_layers: int
    hidden_size: int
    dtype: str
    parameters: dict[str, int]
    """total, active, trained."""
    file_bytes: int
    """Size of the weight files."""
    pesc: dict[str, Any] | None = None
    """The method's settings; None for a dense model."""
    lora: dict[str, Any] | None = None
    crafted_layers: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Router and expert tensors that the settings promise and the files lack."""
    wrong_shape: list[str] = field(default_factory=list)
    """Router and expert tensors of another shape than the settings promise."""
    untouched: list[str] = field(default_factory=list)
    """Experts still at their initial value: they add nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe(path: str | Path, *, base: str | Path | None = None) -> ModelInfo:
    """Describe a model by the same paths, and the same `base`, that `pesc.load` takes.

    Raises:
        FileNotFoundError, ValueError: for a path that is no model, or whose files are damaged; routers and experts
            that are missing or misshapen are no error, but part of the description.
    """
    ref = locate(path, base=base)
    weights, model, config = ref.weights(), ref.skeleton(folded=False), ref.config
    experts, differences = expert_parameters(model), ref.differences(weights)
    TensorDifferences(
        missing=[name for name in differences.missing if name not in experts],
        misshapen={name: shapes for name, shapes in differences.misshapen.items() if name not in experts},
        unexpected=unexpected_experts(differences),
        others=differences.others,
    ).refuse(f"{ref.folder} does not hold the model its config describes")
    pesc_config, settings = ref.pesc_config, ref.settings if ref.kind == "adapter" else None
    return ModelInfo(
        path=str(path),
        kind=ref.kind,
        family=getattr(config, "base_model_type", None) or config.model_type,
        base_model=settings.base_model if settings else None,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        parameters=asdict(count_parameters(model)),
        file_bytes=sum(weights.file_sizes),
        pesc=pesc_config.to_dict() if pesc_config else None,
        lora=settings.lora if settings else None,
        crafted_layers=list(pesc_config.for_layers(config.num_hidden_layers)) if pesc_config else [],
        missing=[name for name in differences.missing if name in experts],
        wrong_shape=[name for name in differences.misshapen if name in experts],
        untouched=_untouched((name for name in experts if name not in differences.misshapen), weights),
    )


def _untouched(experts: Iterable[str], weights: Weights) -> list[str]:
    found = []
    for name in experts:
        if name.endswith("experts.down_proj") and name in weights.tensors:
            zero = ~weights.read(name).flatten(1).any(dim=1)
            found += [f"{name.removesuffix('.down_proj')}.{expert}" for expert in zero.nonzero().flatten().tolist()]
    return found
