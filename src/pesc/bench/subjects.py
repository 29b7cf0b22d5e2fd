"""What is timed: a whole model, or one layer of a large one, in every form."""

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
from pesc.bench.config import Backend, Form, Work
from pesc.config import PescConfig
from pesc.crafting.craft import craft
from pesc.crafting.load import locate
from pesc.crafting.lora import add_lora, lora_parameters
from pesc.crafting.surgery import crafted_ffns, expert_parameters

DENSE, UPCYCLED = "dense", "sparse_upcycling"
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass
class Subject:
    """One dense model and its crafted form, ready to be timed."""

    dense: Any
    crafted: Any
    method: PescConfig
    backends: tuple[str, ...]
    upcycled: Any = None

    def forms(self) -> dict[str, tuple[Any, str | None]]:
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


def build_subject(dense: Any, method: PescConfig, *, lora: bool, forms: Collection[Form] = BACKENDS) -> Subject:
    """A subject of random experts.

    Args:
        dense: a dense model, which becomes the subject's.
        method: the experts.
        lora: whether dense and crafted model carry LoRA, for training.
        forms: what to time beside dense.

    Raises:
        ValueError: for a model or method that the Mixtral form cannot hold.
    """
    references.register()
    crafted = craft(copy.deepcopy(dense), method)
    with torch.no_grad():
        for name, parameter in expert_parameters(crafted).items():
            if name.endswith("down_proj"):
                parameter.normal_(std=0.02)
    upcycled = _upcycled(dense, method) if UPCYCLED in forms else None
    if lora:
        for tuned in (dense, crafted):
            add_lora(tuned, LoraConfig(**_LORA))
        if upcycled is not None:
            _train_upcycled(upcycled)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for built in (dense, crafted, upcycled):
        if built is not None:
            built.to(device)
    return Subject(dense, crafted, method, tuple(f for f in forms if f != UPCYCLED), upcycled)


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

    def of(self, work: Work) -> float:
        """For a kind of work; a backward pass costs one product for the input and one for each trained weight."""
        if work in ("train", "layers"):
            return 2 * self.frozen + 3 * self.trained
        if work == "train_checkpointed":
            return 3 * self.frozen + 4 * self.trained
        return self.frozen + self.trained


def costs(subject: Subject, work: Work) -> dict[str, Cost]:
    """What a token costs by arithmetic alone; for "layers", in the FFNs alone.

    Returns:
        By form; of crafted ones only the chosen experts count.
    """
    ffns = crafted_ffns(subject.crafted)
    prefixes = tuple(f"{name}." for name, _ in ffns)
    linear = {n: m.weight.numel() for n, m in subject.dense.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    base = {name: count for name, count in linear.items() if "lora_" not in name}
    in_ffns = sum(count for name, count in base.items() if name.startswith(prefixes))
    dense = in_ffns if work == "layers" else sum(base.values())
    router = sum(ffn.router.weight.numel() for _, ffn in ffns)
    active = router + sum(round(_bank_size(ffn) * _chosen(ffn)) for _, ffn in ffns)
    found = {DENSE: Cost(dense, _lora_size(subject.dense))}
    found |= dict.fromkeys(subject.backends, Cost(dense, _lora_size(subject.crafted) + active))
    if subject.upcycled is not None:
        config = subject.upcycled.config
        found[UPCYCLED] = Cost(
            dense - in_ffns, _lora_size(subject.upcycled) + config.num_experts_per_tok * in_ffns + router
        )
    return found


def weights_read(subject: Subject, form: str, rows: int) -> float:
    """Linear weights that one decoding step of some rows reads, relative to dense, if rows choose at random."""
    cost = costs(subject, "decode")
    dense = cost[DENSE].frozen
    if form == DENSE:
        return 1.0
    if form == UPCYCLED:
        experts, chosen = subject.upcycled.config.num_local_experts, subject.upcycled.config.num_experts_per_tok
        attention = cost[UPCYCLED].frozen
        return (attention + _hit(chosen / experts, rows) * experts * (dense - attention)) / dense
    bank = 0.0
    for _, ffn in crafted_ffns(subject.crafted):
        bank += _bank_size(ffn) * _hit(_chosen(ffn), rows) + ffn.router.weight.numel()
    return (dense + bank) / dense


def _hit(chosen: float, rows: int) -> float:
    """Share of the experts that at least one of some rows chooses, when each chooses such a share at random."""
    return 1 - (1 - chosen) ** rows


def _chosen(ffn: Any) -> float:
    """Share of a layer's experts that a token chooses."""
    return ffn.router.num_experts_per_tok / ffn.router.num_experts


def _bank_size(ffn: Any) -> int:
    return sum(p.numel() for p in ffn.experts.parameters())


def _lora_size(model: nn.Module) -> int:
    return sum(p.numel() for p in lora_parameters(model).values())


def _upcycled(dense: Any, method: PescConfig) -> MixtralForCausalLM:
    c = dense.config
    if c.model_type != "llama" or not isinstance(method.num_experts, int):
        raise ValueError(
            f"{UPCYCLED} needs a llama model with one num_experts for all layers, not {c.model_type} with "
            f"num_experts {method.num_experts}: leave it out"
        )
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        num_local_experts=method.num_experts,
        num_experts_per_tok=method.num_experts_per_tok,
        tie_word_embeddings=c.tie_word_embeddings,
        sliding_window=None,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).to(dense.dtype).eval()


def _train_upcycled(model: Any) -> None:
    model.add_adapter(LoraConfig(**(_LORA | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})))
    for layer in model.model.layers:
        layer.mlp.requires_grad_(True)  # experts and router
