"""The router's losses: they must do what they are for."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from pesc.method.losses import balance_loss, router_losses, token_mask, z_loss

E, T = 8, 64


def balanced_logits(strength: float = 4.0) -> torch.Tensor:
    """Each expert first choice of an equal share of tokens; second choices equally spread."""
    logits = torch.zeros(T, E)
    tokens = torch.arange(T)
    logits[tokens, tokens % E] = strength
    logits[tokens, (tokens + 1) % E] = strength / 2
    return logits


def collapsed_logits(strength: float = 4.0) -> torch.Tensor:
    logits = torch.zeros(T, E)
    logits[:, 0], logits[:, 1] = strength, strength / 2
    return logits


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_gives_k_and_collapse_costs_more(top_k: int) -> None:
    balanced = balance_loss(router_logits=balanced_logits(), num_experts_per_tok=top_k)
    collapsed = balance_loss(router_logits=collapsed_logits(), num_experts_per_tok=top_k)
    assert balanced == pytest.approx(top_k, rel=1e-4)
    assert collapsed > 1.3 * balanced


def test_minimum_is_at_balance() -> None:
    """Gradient descent on the loss alone takes a collapsed router to an even load."""
    torch.manual_seed(0)
    x_TD = torch.randn(512, 16)
    weight = torch.randn(E, 16) * 0.1
    weight[0] += 1.0
    x_TD[:, :] += 0.5
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    losses = []
    for _ in range(150):
        loss = balance_loss(router_logits=x_TD @ weight.T, num_experts_per_tok=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] == pytest.approx(2.0, abs=0.05)


def test_gradient_reaches_the_router() -> None:
    """The reference's loss is a constant with zero gradient: ours is neither."""
    logits = torch.randn(T, E, requires_grad=True)
    balance_loss(router_logits=logits, num_experts_per_tok=2).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 1e-5


@pytest.mark.parametrize("loss", [lambda **k: balance_loss(num_experts_per_tok=2, **k), z_loss])
def test_padding_changes_nothing(loss) -> None:
    logits = torch.randn(T, E)
    padded = torch.cat([logits, torch.randn(13, E) * 9])
    mask = torch.cat([torch.ones(T), torch.zeros(13)])
    assert loss(router_logits=padded, mask=mask) == pytest.approx(loss(router_logits=logits).item(), rel=1e-5)


def test_nothing_but_padding_is_zero_not_nan() -> None:
    assert balance_loss(router_logits=torch.randn(3, E), num_experts_per_tok=2, mask=torch.zeros(3)) == 0


def test_z_loss_grows_with_the_logits() -> None:
    logits = torch.randn(T, E)
    assert z_loss(router_logits=logits * 3) > z_loss(router_logits=logits)
    assert z_loss(router_logits=logits) == pytest.approx((logits.logsumexp(-1) ** 2).mean().item())


def test_losses_of_a_model_are_summed_per_layer() -> None:
    """Layers that favour different experts are each unbalanced; merging their tokens would hide it."""
    first = collapsed_logits()
    second = first.roll(4, dims=1)
    balance, z = router_losses(router_logits=[first, second], num_experts_per_tok=[2, 2])
    assert balance == pytest.approx(2 * balance_loss(router_logits=first, num_experts_per_tok=2).item())
    assert z == pytest.approx(2 * z_loss(router_logits=first).item())


def test_token_mask_takes_the_new_tokens_of_a_cached_pass() -> None:
    attention_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert token_mask(attention_mask, 4).tolist() == [True, True, True, False]
    assert token_mask(attention_mask, 8).tolist() == [False, True, True, True, True, True, True, False]
    assert token_mask(None, 8) is None


@pytest.mark.parametrize("heads", [1, 3])
def test_token_mask_of_four_dimensions_takes_what_attends_to_itself(heads: int) -> None:
    real_BS = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]).bool()
    seen = (torch.ones(4, 4).tril().bool() & real_BS[:, None])[:, None].expand(-1, heads, -1, -1)
    for dtype in (torch.float32, torch.bfloat16):
        for low in (torch.finfo(dtype).min, float("-inf")):
            added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, low)
            assert torch.equal(token_mask(added, 8), real_BS.flatten())
            assert torch.equal(token_mask(added[:, :, 2:], 4), real_BS[:, 2:].flatten())
    assert torch.equal(token_mask(seen, 8), real_BS.flatten())
    assert torch.equal(token_mask({"full_attention": seen, "sliding_attention": None}, 8), real_BS.flatten())
    assert token_mask(torch.zeros(1, 1, 4, 4), 8).tolist() == [True] * 8


def test_token_mask_of_another_form_is_refused() -> None:
    block = create_block_mask(lambda batch, head, query, key: query >= key, 1, None, 8, 8, device="cpu")
    with pytest.raises(ValueError, match=r"attention_mask \(BlockMask \[1, 1, 8, 8\]\) must be a tensor of 2 or 4"):
        token_mask(block, 8)
    with pytest.raises(ValueError, match=r"attention_mask \(Tensor \[8\]\) must be a tensor of 2 or 4"):
        token_mask(torch.ones(8), 8)
