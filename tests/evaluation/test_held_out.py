"""Held-out loss: against the plain definition, whatever the batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from checkpoints import tiny_dense, write_rows
from families import disturb
from pesc import PescConfig, craft
from pesc.crafting.load import load, load_tokenizer
from pesc.data.chat import encode_messages
from pesc.data.formats import read_examples
from pesc.evaluation.held_out import RowScore, Scores, paired_difference, score_rows
from pesc.evaluation.samples import generate_answers


@pytest.fixture
def setting(tmp_path: Path):
    folder = tiny_dense(tmp_path / "dense")
    model = disturb(craft(load(folder), PescConfig(num_experts=4, adapter_dim=8)))
    return model, load_tokenizer(folder), read_examples(write_rows(tmp_path / "rows.jsonl"))


def test_row_scores_are_the_models_own_loss(setting) -> None:
    model, tokenizer, rows = setting
    scores = score_rows(model, tokenizer, rows, batch_size=5)
    for row, score in zip(rows, scores.rows, strict=True):
        [(input_ids, labels)] = encode_messages(row["messages"], tokenizer)
        loss = model(torch.tensor([input_ids]), labels=torch.tensor([labels])).loss
        assert score.nll / score.tokens == pytest.approx(loss.item(), rel=1e-4)
        assert score.domain == row["domain"]


def test_batches_and_padding_change_nothing(setting) -> None:
    model, tokenizer, rows = setting
    one, many = (score_rows(model, tokenizer, rows, batch_size=size) for size in (1, 12))
    assert [row.nll for row in one.rows] == pytest.approx([row.nll for row in many.rows], rel=1e-4)
    for domain in ("even", "odd"):
        assert all(torch.equal(a, b) for a, b in zip(one.counts[domain], many.counts[domain], strict=True))


def test_expert_counts_cover_every_token_twice(setting) -> None:
    model, tokenizer, rows = setting
    scores = score_rows(model, tokenizer, rows)
    tokens = sum(len(encode_messages(row["messages"], tokenizer)[0][0]) for row in rows)
    for layer in range(2):
        assert sum(int(scores.counts[domain][layer].sum()) for domain in scores.counts) == 2 * tokens


def test_loss_is_weighted_by_tokens() -> None:
    scores = Scores([RowScore("a", 2.0, 1), RowScore("a", 2.0, 3), RowScore("b", 5.0, 5)], {})
    assert scores.loss() == {"a": 1.0, "b": 1.0}
    assert scores.tokens() == {"a": 4, "b": 5}


def test_paired_difference_and_its_error() -> None:
    one = Scores([RowScore("a", 2.0, 2), RowScore("a", 6.0, 2), RowScore("b", 1.0, 1)], {})
    other = Scores([RowScore("a", 1.0, 2), RowScore("a", 3.0, 2), RowScore("b", 2.0, 1)], {})
    difference = paired_difference(one, other)
    assert difference["a"] == pytest.approx((1.0, 0.5))
    assert difference["b"][0] == -1.0
    assert math.isnan(difference["b"][1])


def test_answers_in_a_batch_are_those_of_each_prompt_alone(setting) -> None:
    model, tokenizer, _ = setting
    prompts = ["count to 3", "a much longer prompt than that one"]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=10)
    assert together == [generate_answers(model, tokenizer, [p], max_new_tokens=10)[0] for p in prompts]
