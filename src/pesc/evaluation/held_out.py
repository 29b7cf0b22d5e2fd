"""Loss on held-out conversations, example by example, and what the experts did with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pesc.crafting.backbone import watch_routing
from pesc.data.chat import IGNORE_INDEX, encode_conversation
from pesc.method.routing import Routing
from pesc.report.results import Example, ExpertCounts
from pesc.training.loss import summed_loss


@dataclass(frozen=True)
class HeldOut:
    """Held-out conversations as tokens."""

    examples: list[Example]
    tokens: list[tuple[list[int], list[int]]]
    """(input_ids, labels) of each example, truncated."""
    left_out: int
    """Examples that are not scored: truncation leaves nothing of their answers, so they have no loss to compare."""
    pad_id: int


def encode_held_out(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int = 2048
) -> HeldOut:
    """Tokenize held-out conversations.

    Args:
        rows: conversations with `messages` and `domain` each; one that is split is several examples.
        tokenizer: with a chat template.
        max_length: tokens of an example; the rest is truncated.

    Raises:
        ValueError: when nothing is left to score.
    """
    pairs = [(pair, row["domain"]) for row in rows for pair in encode_conversation(row, tokenizer)]
    examples, tokens = [], []
    for (input_ids, labels), domain in pairs:
        labelled = sum(label != IGNORE_INDEX for label in labels[1:max_length])
        if labelled:
            examples.append(Example(domain, labelled))
            tokens.append((input_ids[:max_length], labels[:max_length]))
    if not examples:
        raise ValueError(f"none of {len(pairs)} held-out examples has an answer within {max_length} tokens")
    return HeldOut(examples, tokens, len(pairs) - len(examples), tokenizer.pad_token_id)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    held_out: HeldOut,
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[list[float], ExpertCounts | None]:
    """Score held-out examples with teacher forcing.

    Args:
        model: in eval mode.
        held_out: what to score.
        batch_size: examples in one forward pass, of like length.
        on_batch: told the number of examples done so far.

    Returns:
        The negative log-likelihood of the assistant's tokens of each example, in nats, in the order of the examples;
        and how often each expert was chosen for all their tokens, None for a dense model.
    """
    order = sorted(range(len(held_out.tokens)), key=lambda i: len(held_out.tokens[i][0]))
    nll = [0.0] * len(order)
    counts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids, labels, mask = _pad([held_out.tokens[i] for i in chosen], held_out.pad_id)
        with watch_routing(model) as passes:
            batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
            losses = summed_loss(model, **{name: tensor.to(model.device) for name, tensor in batch.items()})
        for i, loss in zip(chosen, losses.tolist(), strict=True):
            nll[i] = loss
        _count_experts(passes, mask, [held_out.examples[i].domain for i in chosen], counts)
        on_batch(start + len(chosen))
    return nll, _by_layer(model, counts)


def _pad(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, labels and attention mask of a batch, int64 [B, T]."""
    input_ids = [torch.tensor(ids) for ids, _ in pairs]
    labels = [torch.tensor(labelled) for _, labelled in pairs]
    mask = [torch.ones_like(ids) for ids in input_ids]
    pad = functools.partial(pad_sequence, batch_first=True)
    return pad(input_ids, padding_value=pad_id), pad(labels, padding_value=IGNORE_INDEX), pad(mask)


def _count_experts(
    passes: list[Routing], mask: torch.Tensor, domains: list[str], counts: dict[str, list[torch.Tensor]]
) -> None:
    for routing in passes:
        for domain in set(domains):
            of_domain = mask * torch.tensor([[d == domain] for d in domains])
            layers = routing.counts(of_domain.flatten().bool())
            before = counts.get(domain, [torch.zeros_like(layer) for layer in layers])
            counts[domain] = [old + new for old, new in zip(before, layers, strict=True)]


def _by_layer(model: PreTrainedModel, counts: dict[str, list[torch.Tensor]]) -> ExpertCounts | None:
    """The counts by decoder layer, those without experts included."""
    if not counts:
        return None
    depth = model.config.num_hidden_layers
    settings = model.config.pesc_config.for_layers(depth)
    crafted = {domain: dict(zip(sorted(settings), layers, strict=True)) for domain, layers in counts.items()}
    return ExpertCounts(
        num_experts_per_tok=[settings[at].num_experts_per_tok if at in settings else None for at in range(depth)],
        counts={
            domain: [layers[at].tolist() if at in layers else None for at in range(depth)]
            for domain, layers in crafted.items()
        },
    )
