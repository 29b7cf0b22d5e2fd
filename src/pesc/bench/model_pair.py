"""What is timed: a whole model, or one layer of a large one, in every variant."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, get_args

import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from pesc.bench import references
from pesc.bench.config import Backend, Variant, Workload
from pesc.config import PescConfig
from pesc.crafting.cost import LayerCost, Multiplications, layer_cost
from pesc.crafting.craft import craft
from pesc.crafting.load import locate
from pesc.crafting.lora import add_lora, lora_parameters
from pesc.crafting.surgery import crafted_ffns, expert_parameters

DENSE, UPCYCLED = "dense", "sparse_upcycling"
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass
class ModelPair:
    """One dense model and its crafted variant, ready to be timed."""

    dense: Any
    crafted: Any
    backends: tuple[str, ...]
    upcycled: Any = None

    def variants(self) -> dict[str, tuple[Any, str | None]]:
        """(model, backend) of every row by name."""
        rows: dict[str, tuple[Any, str | None]] = {DENSE: (self.dense, None)}
        rows |= {backend: (self.crafted, backend) for backend in self.backends}
        if self.upcycled is not None:
            rows[UPCYCLED] = (self.upcycled, None)
        return rows


def load_base(model: str, dtype: torch.dtype) -> Any:
    """A dense model by name, or "llama-2-7b-layer": one random decoder layer of that shape, as a model."""
    if model != "llama-2-7b-layer":
        return locate(model).load(dtype=dtype)
    config = LlamaConfig(
        vocab_size=256, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def build_model_pair(
    dense: Any, pesc_config: PescConfig, *, lora: bool, variants: Collection[Variant] = BACKENDS
) -> ModelPair:
    """A pair of random experts.

    Args:
        dense: a dense model, which becomes the pair's.
        pesc_config: the experts.
        lora: whether dense and crafted model carry LoRA, for training.
        variants: what to time beside dense.

    Raises:
        ValueError: for a model or experts that the Mixtral variant cannot hold.
    """
    references.register()
    crafted = craft(copy.deepcopy(dense), pesc_config)
    with torch.no_grad():
        for name, parameter in expert_parameters(crafted).items():
            if name.endswith("down_proj"):
                parameter.normal_(std=0.02)
    upcycled = _upcycled(dense, pesc_config) if UPCYCLED in variants else None
    if lora:
        for tuned in (dense, crafted):
            add_lora(tuned, LoraConfig(**_LORA))
        if upcycled is not None:
            _train_upcycled(upcycled)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for built in (dense, crafted, upcycled):
        if built is not None:
            built.to(device)
    return ModelPair(dense, crafted, tuple(v for v in variants if v != UPCYCLED), upcycled)


def use_backend(model: nn.Module, backend: str | None) -> None:
    """Switch a crafted model's backend; nothing for other models."""
    if backend is not None:
        name = backend if backend in ("eager", "grouped_mm") else f"pesc_{backend}"
        model.set_experts_implementation(name)  # type: ignore[operator]


def costs(pair: ModelPair, workload: Workload) -> dict[str, Multiplications]:
    """The multiplications of a token; for "layers", in the FFNs alone.

    Returns:
        By variant; of crafted ones only the chosen experts count.
    """
    layers = _layer_costs(pair)
    prefixes = tuple(f"{name}." for name, _ in crafted_ffns(pair.crafted))
    linear = {n: m.weight.numel() for n, m in pair.dense.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    base = {name: count for name, count in linear.items() if "lora_" not in name}
    in_ffns = sum(count for name, count in base.items() if name.startswith(prefixes))
    dense = in_ffns if workload == "layers" else sum(base.values())
    active = _lora_size(pair.crafted) + sum(layer.active for layer in layers)
    found = {DENSE: Multiplications(dense, _lora_size(pair.dense))}
    found |= dict.fromkeys(pair.backends, Multiplications(dense, active))
    if pair.upcycled is not None:
        routers = sum(layer.router for layer in layers)
        copies = pair.upcycled.config.num_experts_per_tok * in_ffns
        found[UPCYCLED] = Multiplications(dense - in_ffns, _lora_size(pair.upcycled) + copies + routers)
    return found


def bound(pair: ModelPair, variant: str, workload: Workload) -> float:
    """The time of a variant relative to dense, if only multiplications cost time."""
    cost = costs(pair, workload)

    def of(multiplications: Multiplications) -> float:
        if workload in ("prefill", "decode"):
            return multiplications.forward
        return multiplications.step(checkpointed=workload == "train_checkpointed")

    return of(cost[variant]) / of(cost[DENSE])


def weights_read(pair: ModelPair, variant: str, batch: int) -> float:
    """Linear weights that a decoding step of `batch` sequences reads, relative to dense, if they choose at random."""
    cost = costs(pair, "decode")
    dense = cost[DENSE].frozen
    if variant == DENSE:
        return 1.0
    if variant == UPCYCLED:
        config, attention = pair.upcycled.config, cost[UPCYCLED].frozen
        ffns = LayerCost(0, dense - attention, config.num_local_experts, config.num_experts_per_tok)
        return (attention + ffns.read(batch)) / dense
    return (dense + sum(layer.read(batch) for layer in _layer_costs(pair))) / dense


def _layer_costs(pair: ModelPair) -> list[LayerCost]:
    hidden_size = pair.dense.config.hidden_size
    return [layer_cost(ffn.layer_config, hidden_size) for _, ffn in crafted_ffns(pair.crafted)]


def _lora_size(model: nn.Module) -> int:
    return sum(p.numel() for p in lora_parameters(model).values())


def _upcycled(dense: Any, pesc_config: PescConfig) -> MixtralForCausalLM:
    c = dense.config
    if c.model_type != "llama" or not isinstance(pesc_config.num_experts, int):
        raise ValueError(
            f"{UPCYCLED} needs a llama model with one num_experts for all layers, not {c.model_type} with "
            f"num_experts {pesc_config.num_experts}: leave it out"
        )
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        num_local_experts=pesc_config.num_experts,
        num_experts_per_tok=pesc_config.num_experts_per_tok,
        tie_word_embeddings=c.tie_word_embeddings,
        sliding_window=None,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).to(dense.dtype).eval()


def _train_upcycled(model: Any) -> None:
    model.add_adapter(LoraConfig(**(_LORA | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})))
    for layer in model.model.layers:
        layer.mlp.requires_grad_(True)  # experts and router
