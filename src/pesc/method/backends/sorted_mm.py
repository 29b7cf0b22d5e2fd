"""Tokens sorted by expert, with a backward pass of its own.

S is N = T * K and the rows that fill up the experts' shares (`_rounded`); W is the width of an adapter's first product,
A or, when gated, 2A.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Segments = list[tuple[int, slice]]  # (expert, its rows among the S) of every expert that was chosen


def sorted_mm_experts_forward(
    bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> Any:
    """Tokens sorted by expert once, then two products for each expert, with a backward pass of its own."""
    tokens, chosen = index.shape
    if tokens == 0:
        return torch.zeros_like(hidden_states)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    expert_N = index.reshape(-1)
    ranks_NE = F.one_hot(expert_N, bank.num_experts).cumsum(0)
    segments, starts = _segments(ranks_NE[-1].tolist(), rounded=dtype is not torch.float32)
    rank_N = ranks_NE.gather(1, expert_N.unsqueeze(1)).squeeze(1) - 1
    slot_N = index.new_tensor(starts)[expert_N] + rank_N
    # Rows that only fill up a segment take token 0, with weight 0.
    token_S = slot_N.new_zeros(segments[-1][1].stop)
    token_S.scatter_(0, slot_N, torch.arange(tokens, device=index.device).repeat_interleave(chosen))
    return _SortedExperts.apply(
        hidden_states.to(dtype),
        bank.first.to(dtype),
        bank.down_proj.to(dtype),
        weights.to(dtype),
        token_S,
        slot_N.view_as(index),
        segments,
        bank.has_gate,
    )


class _SortedExperts(torch.autograd.Function):
    """sum_i R_i W_up_i act(W_down_i x) over S rows, those of an expert together.

    Args of `forward`: row s holds token `token_S[s]`; `slot_TK` holds the row of a token's k-th choice.

    Of the forward pass only the first product, [S, W], is kept: gathered tokens and activations are made again in the
    backward pass. The K rows of a token are gathered, weighted and summed in one operation (`embedding_bag`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        first_EWD: torch.Tensor,
        second_EDA: torch.Tensor,
        weight_TK: torch.Tensor,
        token_S: torch.Tensor,
        slot_TK: torch.Tensor,
        segments: Segments,
        gated: bool,
    ) -> torch.Tensor:
        x_SD = x_TD.index_select(0, token_S)
        first_SW = x_TD.new_empty(len(token_S), first_EWD.shape[1])
        for expert, rows in segments:
            torch.mm(x_SD[rows], first_EWD[expert].t(), out=first_SW[rows])
        inner_SA = _activate(first_SW, gated)
        out_SD = x_SD  # its values are no longer needed
        for expert, rows in segments:
            torch.mm(inner_SA[rows], second_EDA[expert].t(), out=out_SD[rows])
        ctx.save_for_backward(x_TD, first_EWD, second_EDA, weight_TK, token_S, slot_TK, first_SW)
        ctx.segments, ctx.gated = segments, gated
        return F.embedding_bag(slot_TK, out_SD, mode="sum", per_sample_weights=weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, first_EWD, second_EDA, weight_TK, token_S, slot_TK, first_SW = ctx.saved_tensors
        _, first_trained, second_trained, *_ = ctx.needs_input_grad
        weight_S = weight_TK.new_zeros(len(token_S)).scatter_(0, slot_TK.reshape(-1), weight_TK.reshape(-1))
        grad_SD = grad_TD.index_select(0, token_S)
        inner_SA = _activate(first_SW, ctx.gated)
        grad_inner_SA = torch.empty_like(inner_SA)
        for expert, rows in ctx.segments:
            torch.mm(grad_SD[rows], second_EDA[expert], out=grad_inner_SA[rows])
        grad_weight_TK = (grad_inner_SA * inner_SA).sum(dim=1)[slot_TK]
        grad_second_EDA = _empty_gradient(second_EDA, ctx.segments) if second_trained else None
        if grad_second_EDA is not None:
            inner_SA.mul_(weight_S.unsqueeze(1))
            for expert, rows in ctx.segments:
                torch.mm(grad_SD[rows].t(), inner_SA[rows], out=grad_second_EDA[expert])
        grad_first_SW = _activate_backward(grad_inner_SA.mul_(weight_S.unsqueeze(1)), first_SW, ctx.gated)
        grad_first_EWD = _empty_gradient(first_EWD, ctx.segments) if first_trained else None
        if grad_first_EWD is not None:
            x_SD = x_TD.index_select(0, token_S)
            for expert, rows in ctx.segments:
                torch.mm(grad_first_SW[rows].t(), x_SD[rows], out=grad_first_EWD[expert])
        grad_x_SD = grad_SD  # its values are no longer needed
        for expert, rows in ctx.segments:
            torch.mm(grad_first_SW[rows], first_EWD[expert], out=grad_x_SD[rows])
        grad_x_TD = F.embedding_bag(slot_TK, grad_x_SD, mode="sum")
        return grad_x_TD, grad_first_EWD, grad_second_EDA, grad_weight_TK, None, None, None, None


def _empty_gradient(bank: torch.Tensor, segments: Segments) -> torch.Tensor:
    """To be written for every chosen expert; zero for the others."""
    gradient = torch.empty_like(bank)
    for expert in set(range(len(bank))).difference(expert for expert, _ in segments):
        gradient[expert].zero_()
    return gradient


def _segments(counts: list[int], *, rounded: bool) -> tuple[Segments, list[int]]:
    """The rows of each chosen expert, and the first row of every expert."""
    heights = [_rounded(count) for count in counts] if rounded else counts
    ends = list(accumulate(heights))
    starts = [end - height for end, height in zip(ends, heights, strict=True)]
    return [(e, slice(starts[e], ends[e])) for e, height in enumerate(heights) if height], starts


def _rounded(count: int) -> int:
    """A count rounded up to one of eight sizes between a power of two and the next, in steps of 16 at least.

    oneDNN compiles a kernel for each new shape of a 16-bit product, which takes many times as long as the product.
    Routing makes new shapes in every layer and step; this leaves few. (fp32 goes to MKL, which compiles nothing.)
    """
    step = max(16, 1 << max(count.bit_length() - 4, 0))
    return -(-count // step) * step


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
