"""The crafted FFN in vLLM: the family's own FFN, a router and a bank of experts, tensor parallel.

Shapes: T tokens, D hidden size, A adapter dim (a: this rank's part of it), E experts, K chosen experts.

Each rank holds all routers and a slice of every adapter's inner width, as vLLM slices its own experts: the first
matrix by rows, the second by columns. What a rank computes is a part of a sum over ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from pesc.config import LayerConfig
from pesc.method.extend import Extension, extend_class


class Router(nn.Module):
    """Chooses K of E experts for each token (eq. 9); the same on every rank."""

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False)

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, K] fp32 and indices [T, K] int64 of the chosen experts."""
        logits_TE = F.linear(hidden_TD, self.weight).float()
        top_logits_TK, index_TK = torch.topk(logits_TE, self.num_experts_per_tok, dim=-1)
        return top_logits_TK.softmax(dim=-1), index_TK


class Experts(nn.Module):
    """This rank's slice of the E adapters of one layer."""

    def __init__(self, hidden_size: int, layer: LayerConfig, rank: int, world_size: int) -> None:
        super().__init__()
        if layer.adapter_dim % world_size:
            raise ValueError(
                f"adapter_dim ({layer.adapter_dim}) must be a multiple of the tensor parallel size ({world_size})"
            )
        self.rank = rank
        self.gated = layer.adapter_activation == "swiglu"
        self.first_name = "gate_up_proj" if self.gated else "up_proj"
        part = layer.adapter_dim // world_size
        first = torch.empty(layer.num_experts, part * (2 if self.gated else 1), hidden_size)
        down = torch.empty(layer.num_experts, hidden_size, part)
        setattr(self, self.first_name, nn.Parameter(first, requires_grad=False))
        self.down_proj = nn.Parameter(down, requires_grad=False)

    def forward(self, hidden_TD: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """This rank's part of sum_i R_i W_up_i act(W_down_i h) over each token's chosen experts: [T, D]."""
        first = getattr(self, self.first_name)
        if current_platform.is_cuda_alike():
            # Triton kernels, which CUDA graphs can hold.
            from vllm.model_executor.layers.fused_moe import MoEActivation, fused_experts

            activation = MoEActivation.SILU if self.gated else MoEActivation.GELU_NO_MUL
            index_TK = index_TK.to(torch.int32)
            return fused_experts(hidden_TD, first, self.down_proj, weights_TK, index_TK, activation=activation)
        return torch.ops.pesc.grouped_experts(hidden_TD, first, self.down_proj, weights_TK, index_TK, self.gated)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Take this rank's slice of a bank's whole parameter.

        Args:
            name: "up_proj" [E, A, D], "gate_up_proj" [E, 2A, D] or "down_proj" [E, D, A].
            tensor: the whole parameter, in any dtype.
        """
        part = self.down_proj.shape[-1]
        if name == "down_proj":
            piece = tensor.narrow(2, self.rank * part, part)
        else:
            halves = tensor.unflatten(1, (2 if self.gated else 1, -1))
            piece = halves.narrow(2, self.rank * part, part).flatten(1, 2)
        getattr(self, name).data.copy_(piece)


class CraftedFFN(Extension, nn.Module):
    """Extends a vLLM FFN's class: y = F(x) + s * sum_i R_i(x) a_i(.) over the K experts chosen for each token."""

    prefix = "Crafted"
    router: Router
    experts: Experts
    layer_config: LayerConfig
    partial: bool

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """1. shared FFN; 2. route on its input; 3. run the chosen adapters; 4. add.

        Args:
            hidden_states: [..., D].

        Returns:
            [..., D]; only this rank's part if the family sums the FFN's output over ranks later.
        """
        shared = super().forward(hidden_states)
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        h_TD = shared.reshape(x_TD.shape)
        weights_TK, index_TK = self.router(x_TD)
        sequential = self.layer_config.adapter_placement == "sequential"
        adapted_TD = h_TD if sequential else x_TD
        if sequential and self.partial:
            # Of a copy: on some devices vLLM sums in place.
            adapted_TD = tensor_model_parallel_all_reduce(h_TD.clone())
        delta_TD = self.experts(adapted_TD, weights_TK * self.layer_config.adapter_scaling, index_TK)
        if not self.partial:
            delta_TD = tensor_model_parallel_all_reduce(delta_TD)
        return (h_TD + delta_TD).view_as(shared)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Take a whole tensor, "router.weight" or "experts.NAME", into this rank's parameters."""
        module, parameter = name.split(".")
        if module == "experts":
            self.experts.load(parameter, tensor)
        else:
            self.router.weight.data.copy_(tensor)


def craft_ffn(ffn: nn.Module, layer: LayerConfig, hidden_size: int) -> CraftedFFN:
    """Give a vLLM FFN its router and experts, uninitialised, in place, in torch's default dtype and device.

    Args:
        ffn: maps [..., D] to [..., D].
        layer: the layer's settings.
        hidden_size: D.

    Raises:
        ValueError: when the adapters cannot be sliced over the tensor parallel ranks.
    """
    rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    # vLLM binds rewritten forwards to instances when it builds on transformers' modules.
    if (own := vars(ffn).pop("forward", None)) is not None:
        dense: Any = type(ffn)
        ffn.__class__ = _with_forward(dense, own.__func__)
    extend_class(ffn, CraftedFFN)
    assert isinstance(ffn, CraftedFFN)
    ffn.layer_config = layer
    ffn.router = Router(hidden_size, layer.num_experts, layer.num_experts_per_tok)
    ffn.experts = Experts(hidden_size, layer, rank, world_size)
    row_parallel = [module for module in ffn.modules() if isinstance(module, RowParallelLinear)]
    ffn.partial = world_size > 1 and any(not module.reduce_results for module in row_parallel)
    return ffn


@functools.cache
def _with_forward(dense: Any, forward: Callable[..., torch.Tensor]) -> Any:
    return type(dense.__name__, (dense,), {"forward": forward, "__module__": dense.__module__})


def grouped_experts(
    hidden_TD: torch.Tensor,
    first_EaD: torch.Tensor,
    down_EDa: torch.Tensor,
    weights_TK: torch.Tensor,
    index_TK: torch.Tensor,
    gated: bool,
) -> torch.Tensor:
    """The chosen adapters' weighted sum, one pair of products for each expert that some token chose.

    Args:
        hidden_TD: the adapters' input.
        first_EaD: first matrices; [E, 2a, D] when gated, the gate's rows first.
        down_EDa: second matrices.
        weights_TK: the router's weights, scaling included.
        index_TK: the chosen experts.
        gated: silu(first half) * second half instead of exact GELU.

    Returns:
        [T, D] in the dtype of `hidden_TD`.
    """
    out_TD = torch.zeros_like(hidden_TD)
    chosen_N = index_TK.flatten()
    order_N = chosen_N.argsort(stable=True)
    weights_N1 = weights_TK.to(hidden_TD.dtype).reshape(-1, 1)
    counts = torch.bincount(chosen_N, minlength=first_EaD.shape[0]).tolist()
    for expert, places in enumerate(order_N.split(counts)):
        if len(places) == 0:
            continue
        tokens = places // index_TK.shape[1]
        inner = F.linear(hidden_TD[tokens], first_EaD[expert])
        if gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(inner)
        out_TD.index_add_(0, tokens, F.linear(inner, down_EDa[expert]) * weights_N1[places])
    return out_TD


# An operator of its own: its shapes depend on the routing, so the compiler must not look inside.
_library = torch.library.Library("pesc", "FRAGMENT")
direct_register_custom_op(
    "grouped_experts",
    grouped_experts,
    fake_impl=lambda hidden_TD, *_: torch.empty_like(hidden_TD),
    target_lib=_library,
)
