"""The language model's loss, computed only at the tokens that are trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from pesc.data.chat import IGNORE_INDEX


def summed_loss(model: Any, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Negative log-likelihood of the labelled tokens of each example.

    The output layer runs only at positions with a label in some example of the batch: with a large vocabulary it is
    most of the memory, and questions are not trained on.

    Args:
        model: a causal LM.
        labels: [B, S], `IGNORE_INDEX` at tokens that are not trained on; not shifted.
        inputs: the model's other arguments: `input_ids` [B, S], and `attention_mask` or `position_ids`.

    Returns:
        [B] fp32, sums in nats.
    """
    targets = labels[:, 1:]
    labelled = (targets != IGNORE_INDEX).any(dim=0).nonzero().flatten()
    logits = model(**inputs, use_cache=False, logits_to_keep=labelled).logits
    token_loss = F.cross_entropy(
        logits.float().transpose(1, 2),
        targets[:, labelled].to(logits.device),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return token_loss.sum(dim=1)
