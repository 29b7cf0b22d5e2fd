"""The bank of adapters that makes the experts: stacked weights, the oracle loop, and a fast backend of our own.

Shapes: T tokens, D hidden size, A adapter dim, E experts, K chosen experts.

The parameters bear transformers' names for stacked experts, so that its backends (`batched_mm`, `grouped_mm`) run
them: `up_proj` is an adapter's first matrix (D to A; the paper's W_down) and `down_proj` its second (A to D; the
paper's W_up).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    grouped_mm_experts_forward,
    use_experts_implementation,
)


class Bank(nn.Module):
    """E adapters of one layer; transformers puts the chosen backend in front of `forward`.

    `config` is the model's transformers config: its `_experts_implementation` names the backend.
    """

    has_gate: bool
    first_name: str
    act_fn: nn.Module

    def __init__(self, config: Any, *, num_experts: int, hidden_size: int, adapter_dim: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        width = adapter_dim * (2 if self.first_name == "gate_up_proj" else 1)
        setattr(self, self.first_name, nn.Parameter(torch.empty(num_experts, width, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, adapter_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """First matrix Kaiming-uniform (a = sqrt(5)), second zero: a fresh adapter adds exactly nothing."""
        first = getattr(self, self.first_name)
        bound = 1 / math.sqrt(first.shape[-1])
        first.uniform_(-bound, bound)
        self.down_proj.zero_()

    def activate(self, first_TA: torch.Tensor) -> torch.Tensor:
        """The adapter's inner values from its first product ([..., A], or [..., 2A] when gated)."""
        return self._apply_gate(first_TA) if self.has_gate else self.act_fn(first_TA)  # type: ignore[operator]

    def rows_are_aligned(self) -> bool:
        """Whether every matrix has rows of a multiple of 16 bytes."""
        _, hidden, dim = self.down_proj.shape
        size = self.down_proj.element_size()
        return hidden * size % 16 == 0 and dim * size % 16 == 0

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """sum_i R_i * W_up_i act(W_down_i h) over each token's chosen experts (the sum in eq. 7, without h itself).

        Args:
            hidden_states: [T, D].
            top_k_index: [T, K] int64.
            top_k_weights: [T, K], the router's weights, scaling included.

        Returns:
            [T, D] in the input's dtype.
        """
        return self.loop(hidden_states, top_k_index, top_k_weights)

    def loop(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The oracle: an expert at a time, only the tokens that chose it. Same contract as `forward`."""
        first_EAD = getattr(self, self.first_name)
        out_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            inner = self.activate(F.linear(hidden_states[token], first_EAD[expert]))
            delta = F.linear(inner, self.down_proj[expert]) * top_k_weights[token, choice, None]
            out_TD = out_TD.index_add(0, token, delta.to(out_TD.dtype))
        return out_TD

    def extra_repr(self) -> str:
        experts, hidden, dim = self.down_proj.shape
        return f"num_experts={experts}, hidden_size={hidden}, adapter_dim={dim}, has_gate={self.has_gate}"


def wide_mm_experts_forward(
    self: Bank, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """All experts as one wide pair of matrix products, the unchosen ones masked to zero.

    Does E / K times the arithmetic of the chosen experts alone, but in two dense products without sorting, gathering
    or copies of the tokens; it wins where E * A is small. Same contract as `Bank.forward`.
    """
    first_EAD = getattr(self, self.first_name)
    experts, width, hidden = first_EAD.shape
    first_TEA = F.linear(hidden_states, first_EAD.reshape(experts * width, hidden)).unflatten(-1, (experts, width))
    gate_TE = hidden_states.new_zeros(hidden_states.shape[0], experts).scatter(
        1, top_k_index, top_k_weights.to(hidden_states.dtype)
    )
    inner_TEA = self.activate(first_TEA) * gate_TE.unsqueeze(-1)
    second_D_EA = self.down_proj.transpose(0, 1).flatten(1)
    return F.linear(inner_TEA.flatten(1), second_D_EA)


def aligned_grouped_mm_experts_forward(
    self: Bank, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' `grouped_mm` where torch's kernel takes the bank's shape, else the oracle loop.

    The kernel wants the rows of every matrix to be multiples of 16 bytes long.
    """
    if self.rows_are_aligned():
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return self.loop(hidden_states, top_k_index, top_k_weights)


def auto_experts_forward(
    self: Bank, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`wide_mm` while all experts together are small (E * A of at most 1024), else `grouped_mm`.

    Up to that size, sorting and gathering the tokens costs more than multiplying with every expert.
    """
    experts, _, adapter_dim = self.down_proj.shape
    forward = wide_mm_experts_forward if experts * adapter_dim <= 1024 else aligned_grouped_mm_experts_forward
    return forward(self, hidden_states, top_k_index, top_k_weights)


# By these names in transformers' `experts_implementation`; its own grouped_mm stays as it is for other models.
ALL_EXPERTS_FUNCTIONS.register("auto", auto_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("wide_mm", wide_mm_experts_forward)
BACKENDS = ExpertsInterface()
BACKENDS["grouped_mm"] = aligned_grouped_mm_experts_forward


@use_experts_implementation(experts_interface=BACKENDS, has_gate=False)
class PlainExperts(Bank):
    """Adapters of the paper: GELU between two projections (eq. 8)."""

    first_name = "up_proj"

    def __init__(self, config: Any, *, num_experts: int, hidden_size: int, adapter_dim: int) -> None:
        super().__init__(config, num_experts=num_experts, hidden_size=hidden_size, adapter_dim=adapter_dim)
        self.act_fn = nn.GELU()


@use_experts_implementation(experts_interface=BACKENDS, has_gate=True)
class GatedExperts(Bank):
    """Gated adapters: silu(W_gate h) * (W_up h), then the second projection; `gate_up_proj` holds both."""

    first_name = "gate_up_proj"

    def __init__(self, config: Any, *, num_experts: int, hidden_size: int, adapter_dim: int) -> None:
        super().__init__(config, num_experts=num_experts, hidden_size=hidden_size, adapter_dim=adapter_dim)
        self.act_fn = nn.SiLU()


Experts = PlainExperts | GatedExperts


def build_experts(
    config: Any, *, activation: str, num_experts: int, hidden_size: int, adapter_dim: int
) -> PlainExperts | GatedExperts:
    """The bank for an `adapter_activation` ("gelu" or "swiglu")."""
    kind = GatedExperts if activation == "swiglu" else PlainExperts
    return kind(config, num_experts=num_experts, hidden_size=hidden_size, adapter_dim=adapter_dim)
