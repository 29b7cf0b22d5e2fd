"""Fast ways to run a bank of adapters, by name in transformers' `experts_implementation`.

Every function here computes what `Bank.loop` computes and takes the same arguments: the bank, the adapters' input
[T, D], the chosen experts [T, K] and their weights [T, K]; it returns [T, D].

Shapes: T tokens, D hidden size, A adapter dim, E experts, K chosen experts, N = T * K; W is the width of an adapter's
first product, A or, when gated, 2A; S is N and the rows that fill up the experts' shares (`_rounded`).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from pesc.method.onednn import FEW_TOKENS, without_onednn

Segments = list[tuple[int, slice]]  # (expert, its rows among the S) of every expert that was chosen

_SMALL_BANK = 1024


def auto_experts_forward(bank: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
    """The backend that was fastest for the shape where it was measured (docs/results.md).

    On a CPU: `token_mm` for one token; `wide_mm` for up to 32 tokens, and without gradients in bfloat16 for any number
    while E * A is at most 1024; else `sorted_mm`. On a GPU and under `torch.compile`, where sorting on the host would
    stall or break the graph: `wide_mm` while E * A is at most 1024, else `grouped_mm`; but for one token, compiled,
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
    with without_onednn(hidden_states, up_to=FEW_TOKENS):
        inner_TEA = bank.activate(first_TEW) * gate_TE.unsqueeze(-1)
    if hidden_states.shape[0] <= FEW_TOKENS:
        # Laying the second matrices side by side copies them, which few tokens would not pay back.
        return torch.bmm(inner_TEA.transpose(0, 1), second_EDA.transpose(1, 2)).sum(dim=0)
    return F.linear(inner_TEA.flatten(1), second_EDA.transpose(0, 1).flatten(1))


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

    Args of `forward`: row s holds token `token_S[s]`; `slot_TK` says in which row a token's k-th choice is computed.

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
    """The rows of each chosen expert, and where those of every expert start."""
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
