"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pesc.config import PescConfig
from pesc.rules import Settings, at_least

Backend = Literal["auto", "sorted_mm", "grouped_mm", "wide_mm", "masks_and_copies", "all_experts"]
Variant = Literal[Backend, "sparse_upcycling"]
Workload = Literal["train", "train_checkpointed", "layers", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Settings):
    """One benchmark.

    Raises:
        ValueError: listing every setting that breaks its rule.
    """

    model: str = "smollm2-135m-instruct"
    """A dense model's name, or llama-2-7b-layer for one random layer of that shape."""
    pesc: PescConfig = field(default_factory=lambda: PescConfig(adapter_dim=64))
    """The experts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of all weights."""
    workloads: list[Workload] = field(default_factory=lambda: ["train", "prefill", "decode"])
    """What is timed. train_checkpointed is with gradient checkpointing; layers is the FFNs alone, forward and
    backward; decode is `generate` with a prompt of 16 tokens."""
    batch: Annotated[int, at_least(1)] = 2
    """Sequences of a batch in training and prefill."""
    tokens: Annotated[int, at_least(1)] = 512
    """Tokens of a sequence in training and prefill."""
    decode_batch: Annotated[list[int], at_least(1)] = field(default_factory=lambda: [1])
    """Sequences of a batch in decoding; each number is timed by itself."""
    decode_tokens: Annotated[int, at_least(1)] = 24
    """Tokens generated."""
    rounds: Annotated[int, at_least(1)] = 5
    """Timed rounds; each runs every variant once."""
    variants: list[Variant] = field(default_factory=lambda: list(get_args(Backend)))
    """What is timed beside the dense model: the experts by backend, masks_and_copies (the published reference) and
    all_experts (Sparsetral's fork); sparse_upcycling, a Mixtral with a copy of the FFN for each expert, needs its
    memory and is not in `layers`."""
