"""The bank of adapters that makes the experts: stacked weights, and the oracle loop.

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
from torch.func import functional_call
from torch.nn import functional as F
from transformers.integrations.moe import use_experts_implementation

from pesc.method.backends import BACKENDS


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

    def __call__(self, hidden_states: torch.Tensor, *choices: torch.Tensor) -> torch.Tensor:
        """`forward` by weights of the input's dtype.

        They may be float32, so that small steps are not lost in training, and transformers' backends cast nothing.
        """
        stored = self._parameters.get("down_proj")  # None where a library puts a parametrization in its place
        if stored is None or stored.dtype == hidden_states.dtype:
            return super().__call__(hidden_states, *choices)
        cast = {name: weight.to(hidden_states.dtype) for name, weight in self.named_parameters()}
        return functional_call(self, cast, (hidden_states, *choices))

    @property
    def first(self) -> torch.Tensor:
        """The adapters' first matrices: [E, A, D], or [E, 2A, D] when gated."""
        return getattr(self, self.first_name)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """First matrix Kaiming-uniform (a = sqrt(5)), second zero: a fresh adapter adds exactly nothing."""
        bound = 1 / math.sqrt(self.first.shape[-1])
        self.first.uniform_(-bound, bound)
        self.down_proj.zero_()

    def activate(self, first: torch.Tensor) -> torch.Tensor:
        """The adapter's inner values from its first product ([..., A], or [..., 2A] when gated)."""
        return self._apply_gate(first) if self.has_gate else self.act_fn(first)  # type: ignore[operator]

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
        out_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            inner = self.activate(F.linear(hidden_states[token], self.first[expert]))
            delta = F.linear(inner, self.down_proj[expert]) * top_k_weights[token, choice, None]
            out_TD = out_TD.index_add(0, token, delta.to(out_TD.dtype))
        return out_TD

    def extra_repr(self) -> str:
        experts, hidden, dim = self.down_proj.shape
        return f"num_experts={experts}, hidden_size={hidden}, adapter_dim={dim}, has_gate={self.has_gate}"


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


def build_experts(config: Any, *, activation: str, num_experts: int, hidden_size: int, adapter_dim: int) -> Experts:
    """The bank for an `adapter_activation` ("gelu" or "swiglu")."""
    kind = GatedExperts if activation == "swiglu" else PlainExperts
    return kind(config, num_experts=num_experts, hidden_size=hidden_size, adapter_dim=adapter_dim)
