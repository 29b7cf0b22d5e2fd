"""All experts as one wide pair of matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from pesc.machine.onednn import FEW_TOKENS, without_onednn


def wide_mm_experts_forward(bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """All experts as one wide pair of matrix products, the unchosen ones masked to zero.

    Does E / K times the arithmetic of the chosen experts alone, but without sorting, gathering or copies of the
    tokens; it wins while E * A is small.
    """
    first_EWD, second_EDA = bank.first, bank.down_proj
    experts, width, hidden = first_EWD.shape
    first_TEW = F.linear(hidden_states, first_EWD.reshape(experts * width, hidden)).unflatten(-1, (experts, width))
    gate_TE = hidden_states.new_zeros(hidden_states.shape[0], experts)
    gate_TE = gate_TE.scatter(1, index, weights.to(hidden_states.dtype))
    with without_onednn(hidden_states, up_to=FEW_TOKENS):
        inner_TEA = bank.activate(first_TEW) * gate_TE.unsqueeze(-1)
    if hidden_states.shape[0] <= FEW_TOKENS:
        # Laying the second matrices side by side copies them: a cost too high for few tokens.
        return torch.bmm(inner_TEA.transpose(0, 1), second_EDA.transpose(1, 2)).sum(dim=0)
    return F.linear(inner_TEA.flatten(1), second_EDA.transpose(0, 1).flatten(1))
