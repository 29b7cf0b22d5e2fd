"""The arithmetic of the method: parameters and multiplications of layers and models (docs/method.md has the table)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pesc.config import LayerConfig
from pesc.crafting.lora import adapter_tensors
from pesc.crafting.surgery import crafted_ffns, expert_parameters


@dataclass(frozen=True)
class LayerCost:
    """Parameters that crafting adds to one layer; as many multiplications for a token that meets them all."""

    router: int
    expert: int
    num_experts: int
    num_experts_per_tok: int

    @property
    def total(self) -> int:
        """Router and all experts: E D + E (2 D A), with swiglu E (3 D A)."""
        return self.router + self.num_experts * self.expert

    @property
    def active(self) -> int:
        """Those that one token meets: the router and K experts."""
        return self.router + self.num_experts_per_tok * self.expert

    def read(self, tokens: int) -> float:
        """Those that a step of `tokens` tokens reads, if each token chooses K of E experts at random."""
        hit = 1 - (1 - self.num_experts_per_tok / self.num_experts) ** tokens
        return self.router + hit * self.num_experts * self.expert


def layer_cost(layer: LayerConfig, hidden_size: int) -> LayerCost:
    """The cost of one crafted layer by its settings."""
    matrices = 3 if layer.adapter_activation == "swiglu" else 2
    return LayerCost(
        router=layer.num_experts * hidden_size,
        expert=matrices * hidden_size * layer.adapter_dim,
        num_experts=layer.num_experts,
        num_experts_per_tok=layer.num_experts_per_tok,
    )


@dataclass(frozen=True)
class Multiplications:
    """Multiply-adds of a token in a model's linear layers, attention's own products left out."""

    frozen: int
    trained: int

    @property
    def forward(self) -> int:
        """A forward pass alone."""
        return self.frozen + self.trained

    def step(self, *, checkpointed: bool = False) -> int:
        """A training step: backward costs a product for each input and one for each trained weight.

        Args:
            checkpointed: the forward pass runs twice.
        """
        return (2 + checkpointed) * self.frozen + (3 + checkpointed) * self.trained


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model with its LoRA folded in."""

    total: int
    """All parameters; tied ones once."""
    active: int
    """Those that take part in computing one token: all but the experts that it is not sent to."""
    trained: int
    """LoRA, routers and experts: the parameters that training changes."""


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count a model's parameters; also works on the meta device.

    Args:
        model: dense or crafted, with or without LoRA. `trained` is 0 for a dense model without LoRA.
    """
    adapters = adapter_tensors(model)
    lora = set(adapters) - set(expert_parameters(model))
    total = sum(_size(parameter) for name, parameter in model.named_parameters() if name not in lora)
    costs = [layer_cost(ffn.layer_config, ffn.router.weight.shape[1]) for _, ffn in crafted_ffns(model)]
    idle = sum(cost.total - cost.active for cost in costs)
    return ParameterCounts(total, total - idle, sum(_size(parameter) for parameter in adapters.values()))


def _size(parameter: nn.Parameter) -> int:
    # A 4-bit weight packs two parameters in a byte and remembers its shape.
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else shape.numel()
