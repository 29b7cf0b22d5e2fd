"""The method's settings: one dataclass, checked when it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pesc.rules import ASCENDING, Settings, above, at_least, below

MODEL_TYPE = "pesc"
"""The `model_type` of crafted models in their config.json, for every dense family."""
Placement = Literal["sequential", "parallel"]
Activation = Literal["gelu", "swiglu"]


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """All settings of one crafted layer; each means what it means in `PescConfig`."""

    num_experts: int
    num_experts_per_tok: int
    adapter_dim: int
    adapter_placement: Placement
    adapter_activation: Activation
    adapter_scaling: float
    adapter_dropout: float


@dataclass(frozen=True, kw_only=True)
class PescConfig(Settings):
    """Parameter-Efficient Sparsity Crafting (arXiv 2401.02731): experts as adapters behind a shared FFN.

    `num_experts`, `num_experts_per_tok` and `adapter_dim` take one number for all crafted layers, or a list with
    one number for each of them, in the order of `layers`.

    Raises:
        ValueError: listing every setting that breaks its rule.
    """

    num_experts: Annotated[int | list[int], at_least(1)] = 8
    """Experts E of a layer."""
    num_experts_per_tok: Annotated[int | list[int], at_least(1)] = 2
    """Experts K that each token is sent to; at most num_experts."""
    adapter_dim: Annotated[int | list[int], at_least(1)] = 512
    """Inner width A of one expert's adapter."""
    adapter_placement: Placement = "sequential"
    """What the adapter reads: "sequential", the FFN's output (the paper, eq. 8); "parallel", the FFN's input."""
    adapter_activation: Activation = "gelu"
    """"gelu" (the paper), or "swiglu": two down projections, one of them gating."""
    adapter_scaling: Annotated[float, above(0)] = 1.0
    """Factor s on every adapter's output (published Camelidae models: 0.25)."""
    adapter_dropout: Annotated[float, at_least(0), below(1)] = 0.0
    """Dropout on the adapters' input while training (the authors' script: 0.1)."""
    router_aux_loss_coef: Annotated[float, at_least(0)] = 0.01
    """Weight alpha of the balance loss (eq. 10)."""
    router_z_loss_coef: Annotated[float, at_least(0)] = 0.0
    """Weight of the router z-loss, which keeps the router's logits small."""
    layers: Annotated[list[int] | None, at_least(0), ASCENDING] = None
    """Indices of the decoder layers that get experts; all of them by default."""

    @staticmethod
    def conflicts(values: dict[str, Any]) -> Iterator[str]:
        if not {"num_experts", "num_experts_per_tok"} <= values.keys():
            return
        experts, chosen = _as_list(values["num_experts"]), _as_list(values["num_experts_per_tok"])
        width = max(len(experts), len(chosen))
        if not {len(experts), len(chosen)} <= {1, width}:
            yield f"num_experts and num_experts_per_tok list {len(experts)} and {len(chosen)} values: must be as many"
            return
        pairs = zip(experts * (width // len(experts)), chosen * (width // len(chosen)), strict=True)
        if any(k > e for e, k in pairs):
            yield "num_experts_per_tok ({num_experts_per_tok}) must be at most num_experts ({num_experts})".format(
                **values
            )

    def for_layers(self, num_hidden_layers: int) -> dict[int, LayerConfig]:
        """Settings of each crafted layer of a model with `num_hidden_layers` layers, by layer index.

        Raises:
            ValueError: for a layer that the model does not have, or a list with the wrong number of values.
        """
        indices = list(range(num_hidden_layers)) if self.layers is None else self.layers
        outside = [index for index in indices if index >= num_hidden_layers]
        if outside:
            raise ValueError(f"layers ({outside}) must be below the model's number of layers ({num_hidden_layers})")
        columns: dict[str, list[Any]] = {}
        for field in dataclasses.fields(LayerConfig):
            value = getattr(self, field.name)
            columns[field.name] = value if isinstance(value, list) else [value] * len(indices)
            if len(columns[field.name]) != len(indices):
                raise ValueError(
                    f"{field.name} lists {len(columns[field.name])} values, but {len(indices)} layers get experts: "
                    "give one number, or one for each of these layers"
                )
        return {
            index: LayerConfig(**{name: column[place] for name, column in columns.items()})
            for place, index in enumerate(indices)
        }


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
