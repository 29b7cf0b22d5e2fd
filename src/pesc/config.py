"""The method's settings: one dataclass, checked when it is built."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args

Placement = Literal["sequential", "parallel"]
Activation = Literal["gelu", "swiglu"]


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What one crafted layer holds."""

    num_experts: int
    num_experts_per_tok: int
    adapter_dim: int


@dataclass(frozen=True, kw_only=True)
class PescConfig:
    """Parameter-Efficient Sparsity Crafting (arXiv 2401.02731): experts as adapters behind a shared FFN.

    `num_experts`, `num_experts_per_tok` and `adapter_dim` take one number for all crafted layers, or a list with
    one number for each of them, in the order of `layers`.

    Raises:
        ValueError: listing every setting that breaks its rule.
    """

    num_experts: int | list[int] = 8
    """Experts E of a layer."""
    num_experts_per_tok: int | list[int] = 2
    """Experts K that each token is sent to; at most num_experts."""
    adapter_dim: int | list[int] = 512
    """Inner width A of one expert's adapter."""
    adapter_placement: Placement = "sequential"
    """What the adapter reads: "sequential", the FFN's output (the paper, eq. 8); "parallel", the FFN's input."""
    adapter_activation: Activation = "gelu"
    """"gelu" (the paper), or "swiglu": two down projections, one of them gating."""
    adapter_scaling: float = 1.0
    """Factor s on every adapter's output (published Camelidae models: 0.25)."""
    adapter_dropout: float = 0.0
    """Dropout on the adapters' input while training (the authors' script: 0.1)."""
    router_aux_loss_coef: float = 0.01
    """Weight alpha of the balance loss (eq. 10)."""
    router_z_loss_coef: float = 0.0
    """Weight of the router z-loss, which keeps the router's logits small."""
    layers: list[int] | None = None
    """Indices of the decoder layers that get experts; all of them by default."""

    def __post_init__(self) -> None:
        problems = [
            *self._number_problems(),
            *self._choice_problems(),
            *self._range_problems(),
            *self._layer_problems(),
        ]
        if problems:
            raise ValueError("PescConfig: " + "; ".join(problems))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PescConfig:
        """Build from plain values (JSON, YAML).

        Raises:
            ValueError: for a key that is no setting, naming the nearest one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [f"unknown key {key!r}{_nearest(key, known)}" for key in values if key not in known]
        if unknown:
            raise ValueError("PescConfig: " + "; ".join(unknown))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def for_layers(self, num_hidden_layers: int) -> dict[int, LayerConfig]:
        """Settings of each crafted layer of a model with `num_hidden_layers` layers, by layer index.

        Raises:
            ValueError: for a layer that the model does not have, or a list with the wrong number of values.
        """
        indices = list(range(num_hidden_layers)) if self.layers is None else self.layers
        outside = [index for index in indices if index >= num_hidden_layers]
        if outside:
            raise ValueError(f"layers ({outside}) must be below the model's number of layers ({num_hidden_layers})")
        columns: dict[str, list[int]] = {}
        for name in ("num_experts", "num_experts_per_tok", "adapter_dim"):
            value = getattr(self, name)
            columns[name] = value if isinstance(value, list) else [value] * len(indices)
            if len(columns[name]) != len(indices):
                raise ValueError(
                    f"{name} lists {len(columns[name])} values, but {len(indices)} layers get experts: "
                    "give one number, or one for each of these layers"
                )
        rows = zip(*columns.values(), strict=True)
        specs = [LayerConfig(**dict(zip(columns, row, strict=True))) for row in rows]
        return dict(zip(indices, specs, strict=True))

    def _number_problems(self) -> list[str]:
        problems = []
        for name in ("num_experts", "num_experts_per_tok", "adapter_dim"):
            value = getattr(self, name)
            if not all(_is_int(item) and item >= 1 for item in _as_list(value)) or value == []:
                problems.append(f"{name} ({value!r}) must be an integer of at least 1, or a list of such")
        if problems:
            return problems
        experts, chosen = _as_list(self.num_experts), _as_list(self.num_experts_per_tok)
        if len(experts) > 1 and len(chosen) > 1 and len(experts) != len(chosen):
            return [
                f"num_experts and num_experts_per_tok list {len(experts)} and {len(chosen)} values: must be as many"
            ]
        width = max(len(experts), len(chosen))
        pairs = zip(experts * (width // len(experts)), chosen * (width // len(chosen)), strict=False)
        if any(k > e for e, k in pairs):
            return [
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most num_experts ({self.num_experts})"
            ]
        return []

    def _choice_problems(self) -> list[str]:
        choices = {"adapter_placement": get_args(Placement), "adapter_activation": get_args(Activation)}
        return [
            f"{name} ({value!r}) must be one of {', '.join(options)}{_nearest(value, options)}"
            for name, options in choices.items()
            if (value := getattr(self, name)) not in options
        ]

    def _range_problems(self) -> list[str]:
        rules = {
            "adapter_scaling": ("above 0", lambda x: 0 < x < float("inf")),
            "adapter_dropout": ("at least 0 and below 1", lambda x: 0 <= x < 1),
            "router_aux_loss_coef": ("at least 0", lambda x: 0 <= x < float("inf")),
            "router_z_loss_coef": ("at least 0", lambda x: 0 <= x < float("inf")),
        }
        return [
            f"{name} ({value!r}) must be a number {rule}"
            for name, (rule, holds) in rules.items()
            if not (_is_number(value := getattr(self, name)) and holds(value))
        ]

    def _layer_problems(self) -> list[str]:
        if self.layers is None:
            return []
        if (
            not isinstance(self.layers, list)
            or not self.layers
            or not all(_is_int(index) and index >= 0 for index in self.layers)
        ):
            return [f"layers ({self.layers!r}) must be a list of layer indices from 0, or left out for all layers"]
        if sorted(set(self.layers)) != self.layers:
            return [f"layers ({self.layers!r}) must be in ascending order, each index once"]
        return []


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nearest(value: Any, options: Any) -> str:
    close = difflib.get_close_matches(str(value), list(options), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
