"""The gradients of an optimizer step as docs/method.md defines them, written out plainly.

Every document runs alone, without padding, through the loop over experts and in eval mode, so that nothing of what
training adds takes part. Losses are sums over tokens and experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from pesc.data.chat import IGNORE_INDEX
from pesc.method.router import Router

Document = tuple[list[int], list[int]]
"""Token ids, and a label for each of them."""
MicroBatch = Sequence[Document]
Gradients = dict[str, torch.Tensor]


def documents(count: int, seed: int = 0, vocab: int = 96) -> list[Document]:
    """Documents of different lengths; the first tokens of each are not trained on."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        ids = torch.randint(3, vocab, (5 + 3 * index % 8,), generator=generator).tolist()
        found.append((ids, [IGNORE_INDEX] * (1 + index % 3) + ids[1 + index % 3 :]))
    return found


def batched(found: Sequence[Document], size: int) -> list[list[Document]]:
    """Documents in micro-batches of `size`; the last may be smaller."""
    return [list(found[start : start + size]) for start in range(0, len(found), size)]


def nll(log_p: torch.Tensor) -> torch.Tensor:
    """What a labelled token costs."""
    return -log_p


def dft(log_p: torch.Tensor) -> torch.Tensor:
    """What it costs under trl's loss_type="dft" (arXiv 2508.05629)."""
    return -log_p * log_p.exp().detach()


def step_gradients(
    model: nn.Module, step: Sequence[MicroBatch], token_loss: Callable = nll, mean_of_means: bool = False
) -> Gradients:
    """Gradients of: the mean loss of the step's labelled tokens, and the mean over micro-batches of router losses.

    Args:
        model: crafted.
        step: the micro-batches of all processes.
        token_loss: of a labelled token's log-probability.
        mean_of_means: the language model's loss is a mean over micro-batches too, as trainers have it that do not
            count the items of a step.
    """
    model = plain_copy(model)
    language, router = [], []
    for micro_batch in step:
        passes = [run_alone(model, ids) for ids, _ in micro_batch]
        costs = [
            token_loss(logits[position - 1].log_softmax(-1)[label])
            for (_, labels), (logits, _) in zip(micro_batch, passes, strict=True)
            for position, label in enumerate(labels)
            if position > 0 and label != IGNORE_INDEX
        ]
        language.append(torch.stack(costs))
        router.append(router_loss(model, [routed for _, routed in passes]))
    means = [costs.mean() for costs in language] if mean_of_means else [torch.cat(language).mean()]
    (torch.stack(means).mean() + torch.stack(router).mean()).backward()
    return gradients(model)


def plain_copy(model: nn.Module) -> nn.Module:
    """The model in eval mode, with the loop over experts, and without gradients."""
    model = copy.deepcopy(model).eval()
    model.set_experts_implementation("eager")
    model.zero_grad()
    return model


def run_alone(model: nn.Module, ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One document: its logits [S, V], and each layer's router logits [S, E]."""
    routed: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, output: routed.append(output[0]))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    logits = model(torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, routed


def router_loss(model: nn.Module, routed: Sequence[list[torch.Tensor]]) -> torch.Tensor:
    """Weighted eq. 10 and z-loss of one micro-batch, a layer, an expert and a token at a time."""
    method, total = model.config.pesc_config, torch.zeros(())
    for layer, router in enumerate(module for module in model.modules() if isinstance(module, Router)):
        tokens = [logits for document in routed for logits in document[layer]]
        for expert in range(router.num_experts):
            chosen = [expert in logits.topk(router.num_experts_per_tok).indices.tolist() for logits in tokens]
            share = sum(chosen) / len(tokens)
            probability = sum(logits.softmax(0)[expert] for logits in tokens) / len(tokens)
            total = total + method.router_aux_loss_coef * router.num_experts * share * probability
        total = total + method.router_z_loss_coef * sum(logits.logsumexp(0) ** 2 for logits in tokens) / len(tokens)
    return total


def gradients(model: nn.Module) -> Gradients:
    """A copy of every gradient, by parameter name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Gradients, defined: Gradients) -> None:
    """Fail where a gradient differs from the definition, naming the tensors."""
    assert ours.keys() == defined.keys()
    off = {name: (ours[name] - defined[name]).abs().max().item() for name in defined}
    scale = {name: defined[name].abs().max().item() for name in defined}
    assert not {name: (off[name], scale[name]) for name in off if off[name] > 1e-5 + 1e-4 * scale[name]}


def dpo_gradients(model, reference, step, beta: float = 0.1) -> Gradients:
    """Of DPO's loss, for pairs of tokens: `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    model, reference = plain_copy(model), plain_copy(reference)
    means = []
    for micro_batch in step:
        losses, routings = [], []
        for pair in micro_batch:
            margin = torch.zeros(())
            for sign, answer in ((1, "chosen_ids"), (-1, "rejected_ids")):
                ids, start = pair["prompt_ids"] + pair[answer], len(pair["prompt_ids"])
                (logits, routing), (reference_logits, _) = run_alone(model, ids), run_alone(reference, ids)
                for position in range(start, len(ids)):
                    log_p = logits[position - 1].log_softmax(-1)[ids[position]]
                    margin = margin + sign * log_p
                    margin = margin - sign * reference_logits[position - 1].log_softmax(-1)[ids[position]].detach()
                routings.append(routing)
            losses.append(-F.logsigmoid(beta * margin))
        means.append(torch.stack(losses).mean() + router_loss(model, routings))
    torch.stack(means).mean().backward()
    return gradients(model)
