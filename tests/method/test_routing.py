"""Routing statistics: counts that add up, a load entropy that means what it says."""

from __future__ import annotations

import pytest
import torch

from pesc.method.routing import expert_counts, load_entropy


def test_counts_add_up_and_skip_padding() -> None:
    logits = torch.randn(20, 5)
    assert expert_counts(logits, 2).sum() == 40
    mask = torch.arange(20) < 7
    assert torch.equal(expert_counts(logits, 2, mask), expert_counts(logits[:7], 2))


def test_unused_experts_count_zero() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4)
    assert expert_counts(logits, 2).tolist() == [4, 4, 0, 0]


def test_load_entropy_is_one_when_even_and_zero_when_collapsed() -> None:
    assert load_entropy([torch.full((8,), 5)]) == pytest.approx(1.0)
    assert load_entropy([torch.tensor([9, 0, 0, 0])]) == pytest.approx(0.0)
    half = load_entropy([torch.tensor([5, 5, 0, 0])])
    assert half == pytest.approx(0.5)
    assert load_entropy([torch.full((8,), 5), torch.tensor([9, 0, 0, 0])]) == pytest.approx(0.5)
