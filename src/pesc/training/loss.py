"""The language model's loss, computed only where there is something to learn."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from pesc.data.chat import IGNORED


def summed_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of the labelled tokens of each row.

    The output layer runs only at positions where some row of the batch has a label: with a large vocabulary it is
    most of the memory, and questions are not learnt.

    Args:
        model: a causal LM.
        input_ids: [B, S].
        attention_mask: [B, S], 1 for real tokens.
        labels: [B, S], `IGNORED` where nothing is learnt; not shifted.

    Returns:
        [B] fp32, sums in nats.
    """
    targets = labels[:, 1:]
    learnt = (targets != IGNORED).any(dim=0).nonzero().flatten()
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=learnt).logits
    token_loss = F.cross_entropy(
        logits.float().transpose(1, 2), targets[:, learnt].to(logits.device), ignore_index=IGNORED, reduction="none"
    )
    return token_loss.sum(dim=1)
