"""What the routers did: their logits, and how many tokens each expert got."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pesc.method.router import Router


@dataclass(frozen=True)
class Routing:
    """What the routers of a model did in one forward pass; lists hold a value for each crafted layer, in order."""

    router_logits: list[torch.Tensor]
    """[T, E] fp32 each, with their autograd graph."""
    num_experts_per_tok: list[int]
    """K of each layer."""
    mask: torch.Tensor | None
    """[T] bool, true for tokens that count; None if all do."""
    aux_loss: torch.Tensor
    """The balance loss (eq. 10) summed over layers, without its weight: a scalar, fp32."""
    loss: torch.Tensor
    """What the pass adds to the gradient: balance and z-loss with their weights, a scalar, fp32."""

    def counts(self, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """How many tokens chose each expert: an [E] int64 tensor on the CPU for each layer.

        Args:
            mask: [T] bool, true for tokens to count; by default all that are no padding.
        """
        return [
            expert_counts(logits.detach(), top_k, self.mask if mask is None else mask)
            for logits, top_k in zip(self.router_logits, self.num_experts_per_tok, strict=True)
        ]


@contextmanager
def record_router_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the router logits of the forward pass that runs inside the block.

    Yields:
        A list that is filled when the block ends: a [T, E] fp32 tensor, with its autograd graph, for each router that
        ran, in order.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.recorded = []
    recorded: list[torch.Tensor] = []
    try:
        yield recorded
        recorded.extend(logits for router in routers for logits in router.recorded or [])
    finally:
        for router in routers:
            router.recorded = None


def expert_counts(
    router_logits: torch.Tensor, num_experts_per_tok: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """How many tokens chose each expert of one layer.

    Args:
        router_logits: [T, E].
        num_experts_per_tok: K.
        mask: [T], true for tokens that count.

    Returns:
        [E] int64 on the CPU; their sum is K times the counted tokens.
    """
    index_TK = router_logits.topk(num_experts_per_tok, dim=-1).indices
    if mask is not None:
        index_TK = index_TK[mask.to(index_TK.device)]
    return torch.bincount(index_TK.flatten(), minlength=router_logits.shape[-1]).cpu()


def load_entropy(counts: Sequence[torch.Tensor]) -> float:
    """How evenly the experts are used: the entropy of their shares over its maximum, a mean over layers.

    Args:
        counts: an [E] tensor for each layer, as `expert_counts` gives it.

    Returns:
        1 when all experts of a layer get as many tokens, 0 when one gets all.
    """
    values = []
    for layer in counts:
        shares = layer.double() / layer.sum().clamp(min=1)
        entropy = torch.special.entr(shares).sum()
        values.append((entropy / torch.tensor(float(len(layer))).log()).item() if len(layer) > 1 else 1.0)
    return sum(values) / len(values)
