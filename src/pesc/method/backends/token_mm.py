"""One token on a CPU: products straight from the bank."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from pesc.machine.onednn import without_onednn


def token_mm_experts_forward(bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """Products of one row straight from the bank, an expert of a token at a time: for one token."""
    first_EWD, second_EDA = bank.first, bank.down_proj
    rows = []
    with without_onednn(hidden_states, up_to=1):
        for token, chosen in enumerate(index.tolist()):
            x_1D = hidden_states[token : token + 1]
            first_KW = torch.cat([F.linear(x_1D, first_EWD[expert]) for expert in chosen])
            inner_KA = bank.activate(first_KW) * weights[token].unsqueeze(1)
            row_1D = F.linear(inner_KA[:1], second_EDA[chosen[0]])
            for position, expert in enumerate(chosen[1:], start=1):
                row_1D = row_1D.addmm(inner_KA[position : position + 1], second_EDA[expert].t())
            rows.append(row_1D)
    return rows[0] if len(rows) == 1 else torch.cat(rows)
