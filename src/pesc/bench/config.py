"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from pesc.config import PescConfig

Backend = Literal["auto", "sorted_mm", "grouped_mm", "wide_mm", "masks_and_copies", "all_experts"]
Form = Literal[Backend, "sparse_upcycling"]
Work = Literal["train", "train_checkpointed", "layers", "prefill", "decode"]


@dataclass(kw_only=True)
class BenchConfig:
    """One benchmark."""

    model: str = "smollm2-135m-instruct"
    """A dense model's name, or llama-2-7b-layer for one random layer of that shape."""
    method: PescConfig = field(default_factory=lambda: PescConfig(adapter_dim=64))
    """The experts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of all weights."""
    work: list[Work] = field(default_factory=lambda: ["train", "prefill", "decode"])
    """What is timed. train_checkpointed is with gradient checkpointing; layers is the FFNs alone, forward and
    backward; decode is `generate` with a prompt of 16 tokens."""
    batch: int = 2
    """Rows of training and prefill."""
    tokens: int = 512
    """Tokens of a row in training and prefill."""
    decode_batch: list[int] = field(default_factory=lambda: [1])
    """Rows of decoding; each number is timed by itself."""
    decode_tokens: int = 24
    """Tokens generated."""
    rounds: int = 5
    """Timed rounds; each runs every form once."""
    forms: list[Form] = field(default_factory=lambda: list(get_args(Backend)))
    """What is timed beside dense: the experts by backend, masks_and_copies (the published reference) and all_experts
    (Sparsetral's fork); sparse_upcycling, a Mixtral form with a copy of the FFN for each expert, needs its memory
    and is not in `layers`."""

    def __post_init__(self) -> None:
        """Raise ValueError for numbers below 1, and for no forms."""
        numbers = {"batch": self.batch, "tokens": self.tokens, "decode_tokens": self.decode_tokens}
        numbers |= {"rounds": self.rounds} | {f"decode_batch[{i}]": rows for i, rows in enumerate(self.decode_batch)}
        if problems := [f"{name} ({number}) must be at least 1" for name, number in numbers.items() if number < 1]:
            raise ValueError("; ".join(problems))
        if not self.forms:
            raise ValueError(f"forms is empty: name some of {', '.join(get_args(Form))}")
