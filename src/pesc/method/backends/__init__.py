"""Fast ways to run a bank of adapters, by name in transformers' `experts_implementation`.

Every function here computes what `Bank.loop` computes and takes the same arguments: the bank, the adapters' input
[T, D], the chosen experts [T, K] and their weights [T, K]; it returns [T, D].

Shapes: T tokens, D hidden size, A adapter dim, E experts, K chosen experts, N = T * K; W is the width of an adapter's
first product, A or, when gated, 2A.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, batched_mm_experts_forward

from pesc.machine.onednn import FEW_TOKENS
from pesc.method.backends.grouped_mm import aligned_grouped_mm_experts_forward
from pesc.method.backends.sorted_mm import sorted_mm_experts_forward
from pesc.method.backends.token_mm import token_mm_experts_forward
from pesc.method.backends.wide_mm import wide_mm_experts_forward

_SMALL_BANK = 1024


def auto_experts_forward(bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """The backend that was fastest for the shape in our measurements (docs/results.md).

    On a CPU: `token_mm` for one token; `wide_mm` for up to 32 tokens, and without gradients in bfloat16 for any number
    while E * A is at most 1024; else `sorted_mm`. On a GPU and under `torch.compile` (sorting on the host would
    stall or break the graph): `wide_mm` while E * A is at most 1024, else `grouped_mm`; but for one token, compiled,
    transformers' `batched_mm`, whose copies of the chosen experts the compiler leaves out.
    """
    experts, _, adapter_dim = bank.down_proj.shape
    tokens, small = hidden_states.shape[0], experts * adapter_dim <= _SMALL_BANK
    if torch.compiler.is_compiling() and tokens == 1:
        forward = batched_mm_experts_forward
    elif torch.compiler.is_compiling() or hidden_states.device.type != "cpu":
        forward = wide_mm_experts_forward if small else aligned_grouped_mm_experts_forward
    elif tokens == 1:
        forward = token_mm_experts_forward
    elif tokens <= FEW_TOKENS or (small and hidden_states.dtype is torch.bfloat16 and not torch.is_grad_enabled()):
        forward = wide_mm_experts_forward
    else:
        forward = sorted_mm_experts_forward
    return forward(bank, hidden_states, index, weights)


# Names known to transformers; its own grouped_mm stays as it is for other models.
AUTO = "pesc_auto"
for _name, _forward in {
    AUTO: auto_experts_forward,
    "pesc_wide_mm": wide_mm_experts_forward,
    "pesc_token_mm": token_mm_experts_forward,
    "pesc_sorted_mm": sorted_mm_experts_forward,
}.items():
    ALL_EXPERTS_FUNCTIONS.register(_name, _forward)
BACKENDS = ExpertsInterface()
BACKENDS["grouped_mm"] = aligned_grouped_mm_experts_forward
