"""Every backend against the oracle loop: values and all gradients, at awkward sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pesc.method.experts import build_experts

BACKENDS = ["batched_mm", "grouped_mm", "pesc_wide_mm", "pesc_token_mm", "pesc_sorted_mm", "pesc_auto"]
# (T, D, A, E, K): one token; empty experts; E no power of two; K = E; one expert; plain; odd widths; large.
SIZES = [
    (1, 16, 8, 4, 2),
    (3, 16, 8, 16, 1),
    (33, 24, 8, 5, 3),
    (17, 16, 8, 4, 4),
    (9, 8, 16, 1, 1),
    (130, 32, 16, 8, 2),
    (7, 10, 5, 3, 2),
    (5, 8, 260, 4, 2),
]


def make_bank(activation: str, experts: int, hidden: int, dim: int, dtype: torch.dtype):
    torch.manual_seed(1)
    config = SimpleNamespace(_experts_implementation="eager")
    bank = build_experts(config, activation=activation, num_experts=experts, hidden_size=hidden, adapter_dim=dim)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.3)
    return bank.to(dtype)


def make_input(size: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    tokens, hidden, _, experts, chosen = size
    torch.manual_seed(2)
    x_TD = torch.randn(tokens, hidden, dtype=dtype)
    logits = torch.randn(tokens, experts)
    weights = logits.topk(chosen).values.softmax(-1).to(dtype)
    return [x_TD, logits.topk(chosen).indices, weights]


def run(bank, backend: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    x, index, weights = inputs[0].clone().requires_grad_(), inputs[1], inputs[2].clone().requires_grad_()
    bank.config._experts_implementation = backend
    bank.zero_grad()
    out = bank(x, index, weights)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), x.grad, weights.grad, *(p.grad for p in bank.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_matches_the_oracle(backend: str, activation: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    bank, inputs = make_bank(activation, size[3], size[1], size[2], dtype), make_input(size, dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 0.04
    for ours, oracle in zip(run(bank, backend, inputs), run(bank, "eager", inputs), strict=True):
        assert ours.dtype == oracle.dtype
        scale = oracle.float().abs().max().clamp(min=1e-3)
        assert (ours.float() - oracle.float()).abs().max() <= tolerance * scale


@pytest.mark.parametrize("backend", ["eager", "pesc_sorted_mm"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradients_in_float64(activation: str, backend: str) -> None:
    bank = make_bank(activation, 3, 6, 4, torch.float64)
    bank.config._experts_implementation = backend
    x, index, weights = make_input((5, 6, 4, 3, 2), torch.float64)

    def function(x: torch.Tensor, weights: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        names = [name for name, _ in bank.named_parameters()]
        return torch.func.functional_call(bank, dict(zip(names, parameters, strict=True)), (x, index, weights))

    inputs = [x, weights, *(p.detach() for p in bank.parameters())]
    assert torch.autograd.gradcheck(function, [i.clone().requires_grad_() for i in inputs])


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_oracle_is_the_papers_sum(activation: str) -> None:
    """Against eq. 7 and 8 written out for one token."""
    bank = make_bank(activation, 4, 8, 4, torch.float64)
    x, index, weights = make_input((1, 8, 4, 4, 2), torch.float64)
    expected = torch.zeros(8, dtype=torch.float64)
    for weight, expert in zip(weights[0], index[0], strict=True):
        first = getattr(bank, bank.first_name)[expert] @ x[0]
        inner = (
            torch.nn.functional.gelu(first) if activation == "gelu" else torch.nn.functional.silu(first[:4]) * first[4:]
        )
        expected += weight * (bank.down_proj[expert] @ inner)
    bank.config._experts_implementation = "eager"
    assert torch.allclose(bank(x, index, weights)[0], expected)


def test_sorted_backward_leaves_frozen_weights_alone() -> None:
    bank, inputs = make_bank("gelu", 4, 8, 4, torch.float32), make_input((6, 8, 4, 4, 2), torch.float32)
    whole = run(bank, "pesc_sorted_mm", inputs)
    bank.requires_grad_(False)
    frozen = run(bank, "pesc_sorted_mm", inputs)
    assert torch.equal(frozen[1], whole[1])
    assert frozen[3:] == [None, None]


def test_fresh_bank_adds_exactly_nothing() -> None:
    config = SimpleNamespace(_experts_implementation="eager")
    bank = build_experts(config, activation="gelu", num_experts=4, hidden_size=8, adapter_dim=4)
    x, index, weights = make_input((6, 8, 4, 4, 2), torch.float32)
    for backend in ["eager", *BACKENDS]:
        config._experts_implementation = backend
        assert torch.count_nonzero(bank(x, index, weights)) == 0


def test_unchosen_experts_get_no_gradient() -> None:
    bank = make_bank("gelu", 4, 8, 4, torch.float32)
    x, _, weights = make_input((6, 8, 4, 4, 2), torch.float32)
    index = torch.tensor([[0, 2]] * 6)
    for backend in ["eager", *BACKENDS]:
        grads = run(bank, backend, [x, index, weights])[3:]
        assert all(torch.count_nonzero(g[[1, 3]]) == 0 and torch.count_nonzero(g[[0, 2]]) > 0 for g in grads)


@pytest.mark.parametrize("trained", ["first", "down_proj"])
def test_sorted_backward_of_one_trained_matrix(trained: str) -> None:
    bank, inputs = make_bank("gelu", 4, 8, 4, torch.float32), make_input((6, 8, 4, 4, 2), torch.float32)
    bank.requires_grad_(False)
    getattr(bank, trained).requires_grad_(True)
    for ours, oracle in zip(run(bank, "pesc_sorted_mm", inputs), run(bank, "eager", inputs), strict=True):
        assert (ours is None) == (oracle is None)
        assert ours is None or torch.allclose(ours, oracle, atol=1e-5)


def test_sorted_in_float16() -> None:
    bank, inputs = make_bank("gelu", 8, 32, 16, torch.float16), make_input((130, 32, 16, 8, 2), torch.float16)
    for ours, oracle in zip(run(bank, "pesc_sorted_mm", inputs), run(bank, "eager", inputs), strict=True):
        assert (ours.float() - oracle.float()).abs().max() <= 0.005 * oracle.float().abs().max()


def test_sorted_of_no_tokens() -> None:
    bank = make_bank("gelu", 4, 8, 4, torch.float32)
    bank.config._experts_implementation = "pesc_sorted_mm"
    empty = torch.zeros(0, 2)
    assert bank(torch.zeros(0, 8), empty.long(), empty).shape == (0, 8)


@pytest.mark.parametrize("backend", ["pesc_wide_mm", "pesc_sorted_mm", "pesc_auto"])
def test_autocast_of_float32_weights(backend: str) -> None:
    bank, inputs = make_bank("gelu", 8, 16, 8, torch.float32), make_input((40, 16, 8, 8, 2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, oracle = run(bank, backend, inputs), run(bank, "eager", inputs)
    for a, b in zip(ours, oracle, strict=True):
        assert (a.float() - b.float()).abs().max() <= 0.03 * b.abs().max()


def test_what_we_register_in_transformers_bears_our_name() -> None:
    code = (
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known; before = set(known)\n"
        "import pesc, pesc.method.experts, pesc.bench.references as references; references.register()\n"
        "print(sorted(set(known) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ast.literal_eval(done.stdout)
    assert "pesc_auto" in names
    assert all(name.startswith("pesc_") for name in names)
