"""The loss where it counts: equal to the plain one."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, tiny_model, tokens
from pesc.data.chat import IGNORE_INDEX
from pesc.training.loss import summed_loss


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_loss(family: str) -> None:
    model, input_ids = tiny_model(family), tokens(3, 11)
    labels = input_ids.clone()
    labels[0, :6], labels[1, :3], labels[2, 8:] = IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX
    ours = summed_loss(model, labels, input_ids=input_ids)
    for row in range(3):
        plain = model(input_ids[row : row + 1], labels=labels[row : row + 1]).loss
        count = (labels[row, 1:] != IGNORE_INDEX).sum()
        assert ours[row].item() == pytest.approx((plain * count).item(), rel=1e-4)


def test_its_gradient_is_the_plain_ones() -> None:
    model, input_ids = tiny_model("llama"), tokens(2, 9)
    labels = input_ids.clone()
    labels[:, :4] = IGNORE_INDEX
    grads = []
    for loss in (
        summed_loss(model, labels, input_ids=input_ids).sum() / 10,
        model(input_ids, labels=labels).loss,
    ):
        model.zero_grad()
        loss.backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert torch.allclose(*grads, atol=1e-6)
