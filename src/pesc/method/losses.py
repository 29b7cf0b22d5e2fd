"""Losses that train the router: pure functions of its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def balance_loss(
    *, router_logits: torch.Tensor, num_experts_per_tok: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Balance loss of one layer without its weight: E * sum_i f_i * p_i (eq. 10).

    f_i is the share of the tokens sent to expert i and p_i the mean probability of expert i under a softmax over all
    experts. The gradient flows through p. With every expert equally busy the value is K; with
    all tokens on the same K experts it approaches E. Its gradient leads from the second to the first.

    Args:
        router_logits: [T, E].
        num_experts_per_tok: K.
        mask: [T], true or 1 for tokens that count; all count when left out.

    Returns:
        A scalar, fp32.
    """
    num_experts = router_logits.shape[-1]
    probabilities_TE = router_logits.float().softmax(dim=-1)
    index_TK = router_logits.topk(num_experts_per_tok, dim=-1).indices
    chosen_TE = torch.zeros_like(probabilities_TE).scatter(-1, index_TK, 1.0)
    return num_experts * (_mean(chosen_TE, mask) * _mean(probabilities_TE, mask)).sum()


def z_loss(*, router_logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Router z-loss of one layer without its weight: the mean squared log-sum-exp of the logits (ST-MoE, eq. 5).

    Args:
        router_logits: [T, E].
        mask: [T], true or 1 for tokens that count.

    Returns:
        A scalar, fp32.
    """
    return _mean(router_logits.float().logsumexp(dim=-1, keepdim=True) ** 2, mask).sum()


def token_mask(attention_mask: Any, num_tokens: int) -> torch.Tensor | None:
    """The mask of the tokens that a forward pass saw, flattened like the router's logits.

    Args:
        attention_mask: None; [B, S] with 1 for real tokens; [B, heads or 1, Q, S], bool or added to the attention
            scores; or a dict of masks by kind of layer. S may include cached tokens before the new ones.
        num_tokens: T, the tokens of this pass.

    Returns:
        [T] bool, or None if every token counts. In a 4-D mask a token counts if it may attend to itself.

    Raises:
        ValueError: for a mask of another form.
    """
    if isinstance(attention_mask, dict):
        # The masks of a model's kinds of attention differ in reach; the tokens that are padding are the same.
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None:
        return None
    shape = tuple(getattr(attention_mask, "shape", ()))
    if isinstance(attention_mask, torch.Tensor) and len(shape) == 2:
        return attention_mask[:, -(num_tokens // shape[0]) :].reshape(-1).bool()
    if isinstance(attention_mask, torch.Tensor) and len(shape) == 4:
        itself_BQ = attention_mask[:, 0].diagonal(offset=shape[3] - shape[2], dim1=-2, dim2=-1)
        if itself_BQ.is_floating_point():
            itself_BQ = itself_BQ > torch.finfo(itself_BQ.dtype).min / 2
        return itself_BQ.bool().expand(num_tokens // shape[2], -1).reshape(-1)
    raise ValueError(
        f"attention_mask ({type(attention_mask).__name__} {list(shape)}) must be a tensor of 2 or 4 "
        "dimensions: the balance loss leaves padding out, and cannot see it in another form"
    )


def router_losses(
    *,
    router_logits: Sequence[torch.Tensor],
    num_experts_per_tok: Sequence[int],
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance and z-loss of a whole model: the sums over its crafted layers, without their weights.

    Args:
        router_logits: a [T, E] tensor for each layer.
        num_experts_per_tok: K of each layer.
        mask: [T], true or 1 for tokens that count.

    Returns:
        (balance, z), two fp32 scalars on the first layer's device.
    """
    device = router_logits[0].device
    balance = torch.zeros((), device=device)
    z = torch.zeros((), device=device)
    for logits, top_k in zip(router_logits, num_experts_per_tok, strict=True):
        layer_mask = None if mask is None else mask.to(logits.device)
        layer_balance = balance_loss(router_logits=logits, num_experts_per_tok=top_k, mask=layer_mask)
        balance = balance + layer_balance.to(device)
        z = z + z_loss(router_logits=logits, mask=layer_mask).to(device)
    return balance, z


def carry_loss(tensor: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
    """Put a loss on board of a tensor: a backward pass through the result also adds the loss's gradient.

    The values stay the tensor's, whatever is computed from them. Megatron-LM's MoEAuxLossAutoScaler and DeepSeek's
    AddAuxiliaryLoss work the same way.

    Args:
        tensor: of any shape.
        loss: a scalar.
        scale: what the loss's gradient is multiplied by.

    Returns:
        The tensor, with another gradient function.
    """
    return _CarryLoss.apply(tensor, loss, scale)


class _CarryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.loss_gradient = torch.full_like(loss, scale)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradients[0], ctx.loss_gradient, None


def _mean(values_TX: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    if mask_T is None:
        return values_TX.mean(dim=0)
    weights_T1 = mask_T.to(values_TX.dtype).unsqueeze(-1)
    # A batch of nothing but padding has a loss of zero, not NaN.
    return (values_TX * weights_T1).sum(dim=0) / weights_T1.sum().clamp(min=1)
