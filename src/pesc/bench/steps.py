"""One timed step of each workload, for each variant of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import nn

from pesc.bench.config import BenchConfig, Workload
from pesc.bench.model_pair import ModelPair, use_backend
from pesc.crafting.lora import train_experts
from pesc.crafting.surgery import crafted_ffns, expert_parameters

_PROMPT = 16  # tokens, before decoding
_BATCHES = 16


@dataclass
class Step:
    """What is timed, and what it keeps in memory."""

    run: Callable[[], object]
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None

    def resident(self) -> Iterator[torch.Tensor]:
        """Tensors alive between steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self._state(list(self.model.parameters()))

    def own_memory(self) -> int:
        """Bytes of the experts and routers: weights and, in training, gradients and optimizer state."""
        own = list(expert_parameters(self.model).values())
        weights = sum(p.numel() * p.element_size() for p in own)
        if self.optimizer is None:
            return weights
        return 2 * weights + sum(t.numel() * t.element_size() for t in self._state(own))

    def _state(self, parameters: list[nn.Parameter]) -> Iterator[torch.Tensor]:
        for parameter in parameters if self.optimizer is not None else []:
            yield from (t for t in self.optimizer.state.get(parameter, {}).values() if t.numel() > 1)  # type: ignore[union-attr]


def make_steps(pair: ModelPair, workload: Workload, batch: int, config: BenchConfig) -> dict[str, Step]:
    """A step of every variant.

    Args:
        pair: the model in all its variants.
        workload: what a step does.
        batch: sequences of a batch.
        config: for the tokens of a sequence.
    """
    dense, variants = pair.dense, pair.variants()
    # A new batch each round, and so new routing; all variants see the same ones.
    torch.manual_seed(0)
    if workload == "layers":
        size = (_BATCHES, batch * config.tokens, dense.config.hidden_size)
        batches = torch.randn(size, device=dense.device, dtype=dense.dtype)
    else:
        batches = torch.randint(3, dense.config.vocab_size, (_BATCHES, batch, config.tokens), device=dense.device)
    optimizers = {model: _optimizer(model) for model, _ in variants.values()} if workload.startswith("train") else {}
    steps = {}
    for variant, (model, backend) in variants.items():
        if workload.startswith("train"):
            checkpointed = workload == "train_checkpointed"
            run = _train(model, cycle(batches), optimizers[model], checkpointed)
        elif workload == "layers":
            ffns = [model.get_submodule(name) for name, _ in crafted_ffns(pair.crafted)]
            run = _layers(model, cycle(batches), ffns)
        elif workload == "prefill":
            run = _prefill(model, cycle(batches))
        else:
            run = _decode(model, cycle(batches[:, :, :_PROMPT]), config.decode_tokens)
        steps[variant] = Step(_with_backend(model, backend, run), model, optimizers.get(model))
    return steps


def _with_backend(model: nn.Module, backend: str | None, run: Callable[[], object]) -> Callable[[], object]:
    def step() -> None:
        use_backend(model, backend)
        run()

    return step


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def _train(
    model: Any, batches: Iterator[torch.Tensor], optimizer: torch.optim.Optimizer, checkpointed: bool
) -> Callable[[], object]:
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable()

    def step() -> None:
        ids = next(batches)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _layers(model: Any, batches: Iterator[torch.Tensor], ffns: list[nn.Module]) -> Callable[[], object]:
    """Every FFN alone, forward and backward, with gradients for its input, its router and its experts."""
    train_experts(model)

    def step() -> None:
        x_TD = next(batches).requires_grad_()
        for ffn in ffns:
            ffn(x_TD).backward(x_TD.detach())
        model.zero_grad()
        x_TD.grad = None

    return step


def _prefill(model: Any, batches: Iterator[torch.Tensor]) -> Callable[[], object]:
    @torch.inference_mode()
    def prefill() -> None:
        model(next(batches), logits_to_keep=1)

    return prefill


def _decode(model: Any, prompts: Iterator[torch.Tensor], tokens: int) -> Callable[[], object]:
    model.generation_config.eos_token_id = None

    def decode() -> None:
        prompt = next(prompts)
        mask = torch.ones_like(prompt)
        model.generate(
            prompt, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    return decode
