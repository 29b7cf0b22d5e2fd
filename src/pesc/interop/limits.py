"""What a stock format can hold of a crafted model, told from the config before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NO_MULTIPLIERS = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
"""Granite's multipliers at the values that change nothing; attention_multiplier is head_dim ** -0.5 there."""
_SCALED_ROPE = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a format with routed experts beside a shared one can hold of a crafted model."""

    bases: tuple[str, ...]
    """Dense families, by model_type."""
    output_bias: bool = False
    """A Llama base's attention_bias, which covers the output projection."""
    any_head_dim: bool = False
    """head_dim other than hidden_size / num_attention_heads."""
    some_layers: bool = False
    """Experts in some of the layers only."""
    ropes: tuple[str, ...] = _SCALED_ROPE
    """Values of rope_type."""


def head_dim_of(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def setting_of(config: Any, name: str) -> Any:
    """A setting of the method that a format has once for all layers (`num_experts`, …)."""
    value = getattr(config.pesc_config, name)
    return value[0] if isinstance(value, list) else value


def crafted_layers(config: Any) -> list[int]:
    """Indices of the layers with experts."""
    return list(config.pesc_config.for_layers(config.num_hidden_layers))


def multipliers_of(config: Any) -> dict[str, float]:
    """Granite's four multipliers: those of a Granite base, or values that change nothing."""
    if config.base_model_type == "granite":
        return {name: float(getattr(config, name)) for name in (*NO_MULTIPLIERS, "attention_multiplier")}
    return NO_MULTIPLIERS | {"attention_multiplier": head_dim_of(config) ** -0.5}


def reasons_against(config: Any, limits: Limits) -> list[str]:
    """Why a format cannot hold a crafted model, a reason each; empty if it can.

    Args:
        config: the crafted model's; no weights are needed.
        limits: what the format can hold.
    """
    pesc_config, reasons = config.pesc_config, []
    if pesc_config.adapter_placement != "parallel" or pesc_config.adapter_activation != "swiglu":
        reasons.append(
            f"its experts are {pesc_config.adapter_placement} + {pesc_config.adapter_activation}, and only parallel + "
            "swiglu ones are routed experts beside a shared one"
        )
    settings = ("num_experts", "num_experts_per_tok", "adapter_dim")
    reasons += uneven_reasons(config, settings, some_layers=limits.some_layers)
    return [*reasons, *_dense_reasons(config, limits)]


def uneven_reasons(config: Any, settings: Iterable[str], *, some_layers: bool) -> list[str]:
    """Why a format that treats all layers alike cannot hold a crafted model.

    Args:
        config: the crafted model's.
        settings: those of the method that the format has once for all layers.
        some_layers: as in `Limits`.
    """
    reasons = []
    for name in settings:
        value = getattr(config.pesc_config, name)
        if isinstance(value, list) and len(set(value)) > 1:
            reasons.append(f"{name} ({value}) differs between layers, and the format has one for all")
    layers = crafted_layers(config)
    if len(layers) < config.num_hidden_layers and not some_layers:
        reasons.append(f"only layers {layers} have experts, and the format gives every layer some")
    return reasons


def _dense_reasons(config: Any, limits: Limits) -> list[str]:
    family, reasons = config.base_model_type, []
    if family not in limits.bases:
        return [f"its base is {family}, and the format holds {', '.join(limits.bases)}"]
    if (activation := config.hidden_act) != "silu":
        reasons.append(f"its FFN's hidden_act is {activation!r}, and the format's must be that of the experts, 'silu'")
    if getattr(config, "mlp_bias", False):
        reasons.append("its FFN has biases (mlp_bias), and the format's has none")
    if getattr(config, "attention_bias", False) and not limits.output_bias:
        reasons.append("its attention has biases on the output (attention_bias), and the format's has none")
    if (window := _window(config)) is not None:
        reasons.append(
            f"its attention slides (sliding_window {window}), and the format's sees everything; with a "
            "max_position_embeddings of at most the window the two are the same"
        )
    head_dim, plain = head_dim_of(config), config.hidden_size / config.num_attention_heads
    if head_dim != plain and not limits.any_head_dim:
        reasons.append(
            f"its head_dim ({head_dim}) is not hidden_size / num_attention_heads ({plain:g}), as the format's"
        )
    rope = config.rope_parameters or {}
    if (kind := rope.get("rope_type", "default")) not in limits.ropes:
        reasons.append(f"its rope_type is {kind!r}, and the format holds {', '.join(limits.ropes)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        reasons.append(
            f"its partial_rotary_factor is {rope['partial_rotary_factor']}, and the format turns whole heads"
        )
    return reasons


def _window(config: Any) -> int | None:
    """The sliding window; None if it covers every position anyway."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = window and (kinds is None or "sliding_attention" in kinds)
    return window if slides and window < config.max_position_embeddings else None
