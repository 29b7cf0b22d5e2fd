"""What the routers do: how many tokens each expert gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from pesc.method.router import Router


@contextmanager
def record_router_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the router logits of every forward pass run inside the block.

    Yields:
        A list that grows by one [T, E] fp32 tensor for each crafted layer passed, in order. The tensors keep their
        autograd graph.
    """
    recorded: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _args, output: recorded.append(output[0]))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


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


def balance(counts: Sequence[torch.Tensor]) -> float:
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
