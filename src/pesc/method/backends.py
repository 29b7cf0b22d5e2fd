"""Fast ways to run a bank of adapters, by name in transformers' `experts_implementation`.

Every function here computes what `Bank.loop` computes and takes the same arguments: the bank, the adapters' input
[T, D], the chosen experts [T, K] and their weights [T, K]; it returns [T, D].

Shapes: T tokens, D hidden size, A adapter dim, E experts, K chosen experts, N = T * K; W is the width of an adapter's
first product, A or, when gated, 2A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, grouped_mm_experts_forward

_FEW_TOKENS = 32
_SMALL_BANK = 1024


def auto_experts_forward(bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """The backend that was fastest for the shape where it was measured (docs/results.md).

    On a CPU in bfloat16: `wide_mm` while E * A is at most 1024. Else `token_mm` for one or two tokens; `wide_mm` for
    up to 32 while E * A is at most 1024, in bfloat16 whatever E * A; `sorted_mm` for more. On a GPU and under
    `torch.compile`, where sorting on the host would stall or break the graph: `wide_mm` while E * A is at most 1024,
    else `grouped_mm`.
    """
    experts, _, adapter_dim = bank.down_proj.shape
    tokens, small = hidden_states.shape[0], experts * adapter_dim <= _SMALL_BANK
    if torch.compiler.is_compiling() or hidden_states.device.type != "cpu":
        forward = wide_mm_experts_forward if small else aligned_grouped_mm_experts_forward
    elif hidden_states.dtype is torch.bfloat16 and small:
        forward = wide_mm_experts_forward
    elif tokens <= 2:
        forward = token_mm_experts_forward
    elif hidden_states.dtype is torch.bfloat16:
        forward = wide_mm_experts_forward if tokens <= _FEW_TOKENS else sorted_mm_experts_forward
    else:
        forward = wide_mm_experts_forward if small and tokens <= _FEW_TOKENS else sorted_mm_experts_forward
    return forward(bank, hidden_states, index, weights)


def wide_mm_experts_forward(bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """All experts as one wide pair of matrix products, the unchosen ones masked to zero.

    Does E / K times the arithmetic of the chosen experts alone, but without sorting, gathering or copies of the
    tokens; it wins where E * A is small.
    """
    first_EWD, second_EDA = bank.first, bank.down_proj
    experts, width, hidden = first_EWD.shape
    first_TEW = F.linear(hidden_states, first_EWD.reshape(experts * width, hidden)).unflatten(-1, (experts, width))
    gate_TE = hidden_states.new_zeros(hidden_states.shape[0], experts)
    gate_TE = gate_TE.scatter(1, index, weights.to(hidden_states.dtype))
    inner_TEA = bank.activate(first_TEW) * gate_TE.unsqueeze(-1)
    if hidden_states.shape[0] <= _FEW_TOKENS:
        # Laying the second matrices side by side copies them, which few tokens would not pay back.
        return torch.bmm(inner_TEA.transpose(0, 1), second_EDA.transpose(1, 2)).sum(dim=0)
    return F.linear(inner_TEA.flatten(1), second_EDA.transpose(0, 1).flatten(1))


def token_mm_experts_forward(bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """Matrix-vector products straight from the bank, an expert of a token at a time: for one or two tokens."""
    first_EWD, second_EDA = bank.first, bank.down_proj
    rows = []
    for x_D, chosen, weights_K in zip(hidden_states, index.tolist(), weights, strict=True):
        first_KW = torch.stack([torch.mv(first_EWD[expert], x_D) for expert in chosen])
        inner_KA = bank.activate(first_KW) * weights_K.unsqueeze(1)
        row_D = torch.mv(second_EDA[chosen[0]], inner_KA[0])
        for expert, inner_A in zip(chosen[1:], inner_KA[1:], strict=True):
            row_D = torch.addmv(row_D, second_EDA[expert], inner_A)
        rows.append(row_D)
    return torch.stack(rows)


def sorted_mm_experts_forward(
    bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> Any:
    """Tokens sorted by expert once, then two products for each expert, with a backward pass of its own."""
    expert_N = index.reshape(-1)
    order_N = expert_N.argsort(stable=True)
    counts = torch.bincount(expert_N, minlength=bank.num_experts).tolist()
    return _SortedExperts.apply(
        hidden_states,
        bank.first,
        bank.down_proj,
        weights.reshape(-1)[order_N],
        order_N.div(index.shape[1], rounding_mode="floor"),
        counts,
        bank.has_gate,
    )


class _SortedExperts(torch.autograd.Function):
    """sum_i R_i W_up_i act(W_down_i x) for tokens in the order of their experts.

    A router weight multiplies the A inner values, not the D outputs. Of the forward pass only the first product,
    [N, W], is kept: the gathered tokens and the activation are made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        first_EWD: torch.Tensor,
        second_EDA: torch.Tensor,
        weight_N: torch.Tensor,
        token_N: torch.Tensor,
        counts: list[int],
        gated: bool,
    ) -> torch.Tensor:
        x_ND = x_TD.index_select(0, token_N)
        first_NW = x_TD.new_empty(len(token_N), first_EWD.shape[1])
        for expert, rows in _rows(counts):
            torch.mm(x_ND[rows], first_EWD[expert].t(), out=first_NW[rows])
        inner_NA = _activate(first_NW, gated) * weight_N.unsqueeze(1)
        out_ND = x_ND  # its values are no longer needed
        for expert, rows in _rows(counts):
            torch.mm(inner_NA[rows], second_EDA[expert].t(), out=out_ND[rows])
        ctx.save_for_backward(x_TD, first_EWD, second_EDA, weight_N, token_N, first_NW)
        ctx.counts, ctx.gated = counts, gated
        return torch.zeros_like(x_TD).index_add_(0, token_N, out_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, first_EWD, second_EDA, weight_N, token_N, first_NW = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, token_N)
        activated_NA = _activate(first_NW, ctx.gated)
        inner_NA = activated_NA * weight_N.unsqueeze(1)
        grad_inner_NA = torch.empty_like(activated_NA)
        grad_second_EDA = torch.zeros_like(second_EDA) if ctx.needs_input_grad[2] else None
        for expert, rows in _rows(ctx.counts):
            torch.mm(grad_ND[rows], second_EDA[expert], out=grad_inner_NA[rows])
            if grad_second_EDA is not None:
                torch.mm(grad_ND[rows].t(), inner_NA[rows], out=grad_second_EDA[expert])
        grad_weight_N = (grad_inner_NA * activated_NA).sum(dim=1)
        grad_first_NW = _activate_backward(grad_inner_NA * weight_N.unsqueeze(1), first_NW, ctx.gated)
        grad_first_EWD = torch.zeros_like(first_EWD) if ctx.needs_input_grad[1] else None
        grad_x_ND = grad_ND  # its values are no longer needed
        x_ND = x_TD.index_select(0, token_N) if grad_first_EWD is not None else x_TD
        for expert, rows in _rows(ctx.counts):
            if grad_first_EWD is not None:
                torch.mm(grad_first_NW[rows].t(), x_ND[rows], out=grad_first_EWD[expert])
            torch.mm(grad_first_NW[rows], first_EWD[expert], out=grad_x_ND[rows])
        grad_x_TD = torch.zeros_like(x_TD).index_add_(0, token_N, grad_x_ND)
        return grad_x_TD, grad_first_EWD, grad_second_EDA, grad_weight_N, None, None, None


def _rows(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that was chosen."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found


def _activate(first_NW: torch.Tensor, gated: bool) -> torch.Tensor:
    if not gated:
        return F.gelu(first_NW)
    gate_NA, up_NA = first_NW.chunk(2, dim=-1)
    return F.silu(gate_NA) * up_NA


def _activate_backward(grad_NA: torch.Tensor, first_NW: torch.Tensor, gated: bool) -> torch.Tensor:
    if not gated:
        return torch.ops.aten.gelu_backward(grad_NA, first_NW)
    gate_NA, up_NA = first_NW.chunk(2, dim=-1)
    grad_gate_NA = torch.ops.aten.silu_backward(grad_NA * up_NA, gate_NA)
    return torch.cat([grad_gate_NA, grad_NA * F.silu(gate_NA)], dim=-1)


def aligned_grouped_mm_experts_forward(
    bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> Any:
    """transformers' `grouped_mm` where torch's kernel takes the bank's shape, else the oracle loop.

    The kernel wants the rows of every matrix to be multiples of 16 bytes long.
    """
    _, hidden, adapter_dim = bank.down_proj.shape
    size = bank.down_proj.element_size()
    if hidden * size % 16 or adapter_dim * size % 16:
        return bank.loop(hidden_states, index, weights)
    return grouped_mm_experts_forward(bank, hidden_states, index, weights)


# Names known to transformers; its own grouped_mm stays as it is for other models.
ALL_EXPERTS_FUNCTIONS.register("auto", auto_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("wide_mm", wide_mm_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("token_mm", token_mm_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("sorted_mm", sorted_mm_experts_forward)
BACKENDS = ExpertsInterface()
BACKENDS["grouped_mm"] = aligned_grouped_mm_experts_forward
