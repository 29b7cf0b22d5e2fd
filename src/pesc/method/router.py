"""The top-k router (eq. 9) and a way to watch it."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from pesc.machine.onednn import FEW_TOKENS, without_onednn


class Router(nn.Module):
    """Chooses K of E experts for each token from the FFN's input.

    R(x) = softmax(KeepTopK(W_r x)) (eq. 9): the K weights of a token sum to 1.

    Not an `nn.Linear`, so that quantizers and LoRA leave it alone.
    """

    recorded: list[torch.Tensor] | None = None
    """A list that takes the logits, inside `record_router_logits`. (A compiled model may leave a hook out.)"""

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming-uniform with a = sqrt(5), as the authors initialise it."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        self.weight.uniform_(-bound, bound)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            hidden_states: [T, D], the FFN's input.

        Returns:
            router_logits [T, E] fp32; top_k_weights [T, K] in the input's dtype; top_k_index [T, K] int64.
        """
        with without_onednn(hidden_states, up_to=FEW_TOKENS):
            logits_TE = F.linear(hidden_states, self.weight.to(hidden_states.dtype)).float()
        if self.recorded is not None:
            self.recorded.append(logits_TE)
        top_logits_TK, index_TK = torch.topk(logits_TE, self.num_experts_per_tok, dim=-1)
        weights_TK = top_logits_TK.softmax(dim=-1).to(hidden_states.dtype)
        return logits_TE, weights_TK, index_TK

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, num_experts_per_tok={self.num_experts_per_tok}"
