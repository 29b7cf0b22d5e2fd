"""Held-out loss: against the plain definition, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import tiny_dense, write_rows
from families import disturb
from pesc import PescConfig, craft
from pesc.crafting.load import load, load_tokenizer
from pesc.data.chat import encode_messages
from pesc.data.formats import read_examples
from pesc.evaluation.held_out import encode_held_out, score
from pesc.evaluation.samples import generate_answers


@pytest.fixture
def setting(tmp_path: Path):
    folder = tiny_dense(tmp_path / "dense")
    model = disturb(craft(load(folder), PescConfig(num_experts=4, adapter_dim=8)))
    return model, load_tokenizer(folder), read_examples(write_rows(tmp_path / "rows.jsonl"))


def test_scores_are_the_models_own_loss(setting) -> None:
    model, tokenizer, conversations = setting
    held_out = encode_held_out(conversations, tokenizer)
    nll, _ = score(model, held_out, batch_size=5)
    for conversation, example, own in zip(conversations, held_out.examples, nll, strict=True):
        [(input_ids, labels)] = encode_messages(conversation["messages"], tokenizer)
        loss = model(torch.tensor([input_ids]), labels=torch.tensor([labels])).loss
        assert own / example.tokens == pytest.approx(loss.item(), rel=1e-4)
        assert example.domain == conversation["domain"]


def test_batches_and_padding_change_nothing(setting) -> None:
    model, tokenizer, conversations = setting
    held_out = encode_held_out(conversations, tokenizer)
    (one, one_by_one), (many, together) = (score(model, held_out, batch_size=size) for size in (1, 12))
    assert one == pytest.approx(many, rel=1e-4)
    assert one_by_one == together


def test_expert_counts_cover_every_token_twice(setting) -> None:
    model, tokenizer, conversations = setting
    _, routing = score(model, encode_held_out(conversations, tokenizer))
    tokens = sum(len(encode_messages(c["messages"], tokenizer)[0][0]) for c in conversations)
    for layer in range(2):
        assert sum(routing.choices(domain, layer).sum() for domain in routing.counts) == 2 * tokens


def test_routing_names_the_decoder_layers_without_experts(setting, tmp_path: Path) -> None:
    _, tokenizer, conversations = setting
    model = craft(load(tmp_path / "dense"), PescConfig(num_experts=4, adapter_dim=8, layers=[1]))
    _, routing = score(model, encode_held_out(conversations, tokenizer))
    assert routing.num_experts_per_tok == [None, 2]
    assert all(layers[0] is None and len(layers[1]) == 4 for layers in routing.counts.values())
    assert score(load(tmp_path / "dense"), encode_held_out(conversations, tokenizer))[1] is None


def test_an_answer_that_is_truncated_away_is_left_out(setting) -> None:
    _, tokenizer, _ = setting

    def conversation(prompt: str) -> dict[str, Any]:
        return {
            "domain": "a",
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes"}],
        }

    held_out = encode_held_out([conversation("why"), conversation("why " * 40)], tokenizer, max_length=60)
    assert (len(held_out.examples), held_out.left_out) == (1, 1)
    assert all(len(input_ids) <= 60 for input_ids, _ in held_out.tokens)
    with pytest.raises(ValueError, match="none of 2 held-out examples has an answer within 5 tokens"):
        encode_held_out([conversation("why")] * 2, tokenizer, max_length=5)


def test_answers_in_a_batch_are_those_of_each_prompt_alone(setting) -> None:
    model, tokenizer, _ = setting
    prompts = ["count to 3", "a much longer prompt than that one"]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=10)
    assert together == [generate_answers(model, tokenizer, [p], max_new_tokens=10)[0] for p in prompts]
