"""transformers' `grouped_mm`, for the shapes that torch's kernel takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import grouped_mm_experts_forward


def aligned_grouped_mm_experts_forward(
    bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> Any:
    """transformers' `grouped_mm` if torch's kernel takes the bank's shape, else the oracle loop.

    The kernel wants the rows of every matrix to be multiples of 16 bytes long.
    """
    _, hidden, adapter_dim = bank.down_proj.shape
    size = bank.down_proj.element_size()
    if hidden * size % 16 or adapter_dim * size % 16:
        return bank.loop(hidden_states, index, weights)
    return grouped_mm_experts_forward(bank, hidden_states, index, weights)
