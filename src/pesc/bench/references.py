"""How others compute the same layer, from their own descriptions, as backends to be timed. Not for use.

Same contract as the functions of `pesc.method.backends`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


def masks_and_copies(bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """The published reference: K copies of every token, a boolean mask and a full-size result for each expert."""
    tokens, chosen = index.shape
    copies_ND = hidden_states.repeat_interleave(chosen, dim=0)
    expert_N = index.reshape(-1)
    out_ND = torch.empty_like(copies_ND)
    for expert in range(bank.num_experts):
        mask_N = expert_N == expert
        inner = bank.activate(F.linear(copies_ND[mask_N], bank.first[expert]))
        out_ND[mask_N] = F.linear(inner, bank.down_proj[expert])
    return (out_ND.view(tokens, chosen, -1) * weights.unsqueeze(-1)).sum(dim=1)


def all_experts(bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """Sparsetral's fork of it: every expert for every token, the unchosen with weight zero."""
    gate_TE = weights.new_zeros(hidden_states.shape[0], bank.num_experts).scatter(1, index, weights)
    out_TD = torch.zeros_like(hidden_states)
    for expert in range(bank.num_experts):
        inner = bank.activate(F.linear(hidden_states, bank.first[expert]))
        out_TD = out_TD + F.linear(inner, bank.down_proj[expert]) * gate_TE[:, expert, None]
    return out_TD


def register() -> None:
    """Make the references known to transformers by name."""
    for forward in (masks_and_copies, all_experts):
        ALL_EXPERTS_FUNCTIONS.register(f"pesc_{forward.__name__}", forward)
