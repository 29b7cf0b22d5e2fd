"""The crafted FFN: one shared FFN, a router and a bank of experts behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pesc.config import LayerConfig
from pesc.method.experts import Experts, build_experts
from pesc.method.extend import Extension, extend_class
from pesc.method.router import Router


class CraftedFFN(Extension, nn.Module):
    """Extends a dense FFN's class: y = F(x) + s * sum_i R_i(x) a_i(.) over the K experts chosen for each token.

    Since a token's weights R_i sum to 1, this is eq. 7 with the shared FFN run once per token and no copy of its
    output. The adapters read F(x) ("sequential", eq. 8) or x ("parallel").

    It extends the dense class instead of wrapping a dense module, so that every dense weight keeps its name: in
    checkpoints, tensor-parallel plans and LoRA targets. `craft_ffn` makes one.
    """

    prefix = "Crafted"
    router: Router
    experts: Experts
    layer_config: LayerConfig

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """1. shared FFN; 2. route on its input; 3. run the chosen adapters; 4. add.

        Args:
            hidden_states: [..., D].

        Returns:
            [..., D].
        """
        shared = super().forward(hidden_states)
        hidden_size = hidden_states.shape[-1]
        _, weights_TK, index_TK = self.router(hidden_states.reshape(-1, hidden_size))
        layer = self.layer_config
        adapted = shared if layer.adapter_placement == "sequential" else hidden_states
        if layer.adapter_dropout > 0:
            adapted = F.dropout(adapted, layer.adapter_dropout, self.training)
        if layer.adapter_scaling != 1:
            weights_TK = weights_TK * layer.adapter_scaling
        delta_TD = self.experts(adapted.reshape(-1, hidden_size), index_TK, weights_TK)
        return shared + delta_TD.view_as(shared)


def craft_ffn(ffn: nn.Module, layer: LayerConfig, hf_config: Any) -> CraftedFFN:
    """Give a dense FFN its router and experts, in place.

    Args:
        ffn: maps [..., D] to [..., D].
        layer: the layer's settings.
        hf_config: the model's transformers config, for D and for `_experts_implementation`, which the bank follows.

    Returns:
        The same module, now a `CraftedFFN`, computing exactly what it computed before.
    """
    extend_class(ffn, CraftedFFN)
    assert isinstance(ffn, CraftedFFN)
    ffn.layer_config = layer
    ffn.router = Router(hf_config.hidden_size, layer.num_experts, layer.num_experts_per_tok)
    ffn.experts = build_experts(
        hf_config,
        activation=layer.adapter_activation,
        num_experts=layer.num_experts,
        hidden_size=hf_config.hidden_size,
        adapter_dim=layer.adapter_dim,
    )
    return ffn
