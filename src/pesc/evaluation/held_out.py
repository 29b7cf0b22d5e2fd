"""Loss on held-out conversations, by domain, and what the experts did with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pesc.crafting.backbone import watch_routing
from pesc.data.chat import IGNORE_INDEX, encode_messages
from pesc.method.routing import Routing
from pesc.training.loss import summed_loss


@dataclass
class RowScore:
    """One held-out conversation under one model."""

    domain: str
    nll: float
    """Negative log-likelihood of the assistant's tokens, summed, in nats."""
    tokens: int
    """The assistant's tokens."""


@dataclass
class Scores:
    """A model on a set of held-out conversations."""

    rows: list[RowScore]
    counts: dict[str, list[torch.Tensor]]
    """Tokens each expert got, by domain: an [E] int64 tensor for each crafted layer; empty for dense models."""

    def loss(self) -> dict[str, float]:
        """Mean loss of an assistant's token, by domain, in nats."""
        return {
            domain: sum(row.nll for row in rows) / sum(row.tokens for row in rows)
            for domain, rows in _by_domain(self.rows).items()
        }

    def tokens(self) -> dict[str, int]:
        """The assistant's tokens, by domain."""
        return {domain: sum(row.tokens for row in rows) for domain, rows in _by_domain(self.rows).items()}


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_length: int = 2048,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Score conversations with teacher forcing.

    Args:
        model: in eval mode.
        tokenizer: with a chat template.
        rows: `messages` and `domain` each.
        max_length: tokens of a row; what lies behind is cut off.
        batch_size: rows in one forward pass, of like length.
        on_batch: told the number of rows done so far.

    Returns:
        The scores, in the order of `rows`; more than one of a conversation that `encode_messages` splits.
    """
    pairs = [(pair, row["domain"]) for row in rows for pair in encode_messages(row["messages"], tokenizer)]
    encoded, domains = [pair for pair, _ in pairs], [domain for _, domain in pairs]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    scores: list[RowScore | None] = [None] * len(encoded)
    counts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids, labels, mask = _pad([encoded[i] for i in chosen], max_length, tokenizer.pad_token_id)
        with watch_routing(model) as passes:
            batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
            nll = summed_loss(model, **{name: tensor.to(model.device) for name, tensor in batch.items()})
        for i, row_nll, row_labels in zip(chosen, nll.tolist(), labels, strict=True):
            scores[i] = RowScore(domains[i], row_nll, int((row_labels[1:] != IGNORE_INDEX).sum()))
        _count_experts(passes, mask, [domains[i] for i in chosen], counts)
        on_batch(start + len(chosen))
    return Scores([score for score in scores if score is not None], counts)


def paired_difference(first: Scores, second: Scores) -> dict[str, tuple[float, float]]:
    """How much the loss of `first` differs from that of `second`, row by row on the same rows.

    Returns:
        By domain: (mean over rows of the difference of a row's mean token loss, its standard error); the error is
        NaN for a single row.
    """
    differences: dict[str, list[float]] = {}
    for one, other in zip(first.rows, second.rows, strict=True):
        assert (one.domain, one.tokens) == (other.domain, other.tokens)
        differences.setdefault(one.domain, []).append((one.nll - other.nll) / max(one.tokens, 1))
    return {domain: _mean_and_error(values) for domain, values in differences.items()}


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _by_domain(rows: Sequence[RowScore]) -> dict[str, list[RowScore]]:
    found: dict[str, list[RowScore]] = {}
    for row in rows:
        found.setdefault(row.domain, []).append(row)
    return found


def _pad(
    rows: list[tuple[list[int], list[int]]], max_length: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = min(max_length, max(len(ids) for ids, _ in rows))
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (ids, row_labels) in enumerate(rows):
        length = min(width, len(ids))
        input_ids[i, :length] = torch.tensor(ids[:length])
        labels[i, :length] = torch.tensor(row_labels[:length])
        mask[i, :length] = 1
    return input_ids, labels, mask


def _count_experts(
    passes: list[Routing], mask: torch.Tensor, domains: list[str], counts: dict[str, list[torch.Tensor]]
) -> None:
    for routing in passes:
        for domain in set(domains):
            of_domain = mask * torch.tensor([[d == domain] for d in domains])
            layers = routing.counts(of_domain.flatten().bool())
            before = counts.get(domain, [torch.zeros_like(layer) for layer in layers])
            counts[domain] = [old + new for old, new in zip(before, layers, strict=True)]
