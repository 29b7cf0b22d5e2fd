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


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a token in a model's linear layers, attention's own products left out."""

    frozen: float
    trained: float

    def of(self, workload: Workload) -> float:
        """For a workload; a backward pass costs one product for the input and one for each trained weight."""
        if workload in ("train", "layers"):
            return 2 * self.frozen + 3 * self.trained
        if workload == "train_checkpointed":
            return 3 * self.frozen + 4 * self.trained
        return self.frozen + self.trained


def costs(pair: ModelPair, workload: Workload) -> dict[str, Cost]:
    """What a token costs by arithmetic alone; for "layers", in the FFNs alone.

    Returns:
        By variant; of crafted ones only the chosen experts count.
    """
    ffns = crafted_ffns(pair.crafted)
    prefixes = tuple(f"{name}." for name, _ in ffns)
    linear = {n: m.weight.numel() for n, m in pair.dense.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    base = {name: count for name, count in linear.items() if "lora_" not in name}
    in_ffns = sum(count for name, count in base.items() if name.startswith(prefixes))
    dense = in_ffns if workload == "layers" else sum(base.values())
    router = sum(ffn.router.weight.numel() for _, ffn in ffns)
    active = router + sum(round(_bank_size(ffn) * _chosen(ffn)) for _, ffn in ffns)
    found = {DENSE: Cost(dense, _lora_size(pair.dense))}
    found |= dict.fromkeys(pair.backends, Cost(dense, _lora_size(pair.crafted) + active))
    if pair.upcycled is not None:
        config = pair.upcycled.config
        found[UPCYCLED] = Cost(
            dense - in_ffns, _lora_size(pair.upcycled) + config.num_experts_per_tok * in_ffns + router
        )
    return found


def weights_read(pair: ModelPair, variant: str, batch: int) -> float:
    """Linear weights that a decoding step of `batch` sequences reads, relative to dense, if they choose at random."""
    cost = costs(pair, "decode")
    dense = cost[DENSE].frozen
    if variant == DENSE:
        return 1.0
    if variant == UPCYCLED:
        experts, chosen = pair.upcycled.config.num_local_experts, pair.upcycled.config.num_experts_per_tok
        attention = cost[UPCYCLED].frozen
        return (attention + _hit(chosen / experts, batch) * experts * (dense - attention)) / dense
    bank = 0.0
    for _, ffn in crafted_ffns(pair.crafted):
        bank += _bank_size(ffn) * _hit(_chosen(ffn), batch) + ffn.router.weight.numel()
    return (dense + bank) / dense


def _hit(chosen: float, batch: int) -> float:
    """Share of the experts that at least one of `batch` sequences chooses, if each chooses such a share at random."""
    return 1 - (1 - chosen) ** batch


def _chosen(ffn: Any) -> float:
    """Share of a layer's experts that a token chooses."""
    return ffn.router.num_experts_per_tok / ffn.router.num_experts


def _bank_size(ffn: Any) -> int:
    return sum(p.numel() for p in ffn.experts.parameters())


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
