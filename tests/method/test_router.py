"""The router: eq. 9 in fp32, and the recorder."""

from __future__ import annotations

import torch

from pesc.method.router import Router
from pesc.method.routing import record_router_logits


def test_top_k_then_softmax() -> None:
    router = Router(hidden_size=16, num_experts=5, num_experts_per_tok=3)
    x_TD = torch.randn(7, 16)
    logits, weights, index = router(x_TD)
    kept = torch.full_like(logits, float("-inf"))
    kept.scatter_(1, logits.topk(3).indices, logits.topk(3).values)
    assert torch.allclose(torch.zeros_like(kept).scatter(1, index, weights), kept.softmax(-1))
    assert torch.allclose(weights.sum(-1), torch.ones(7))


def test_softmax_is_fp32_whatever_the_model() -> None:
    router = Router(16, 8, 2).to(torch.bfloat16)
    x_TD = torch.randn(4, 16, dtype=torch.bfloat16)
    logits, weights, _ = router(x_TD)
    assert logits.dtype == torch.float32
    assert torch.equal(weights, logits.topk(2).values.softmax(-1).to(torch.bfloat16))


def test_the_recorder_takes_what_runs_inside_and_leaves_nothing_behind() -> None:
    routers, x = torch.nn.ModuleList([Router(16, 8, 2), Router(16, 5, 1)]), torch.randn(4, 16)
    with record_router_logits(routers) as recorded:
        logits = [router(x)[0] for router in reversed(routers)]
    routers[0](x)
    assert recorded[0] is logits[1]
    assert recorded[1] is logits[0]
    assert len(recorded) == 2
    assert [router.recorded for router in routers] == [None, None]
