"""Decoding under `torch.compile`, with a static cache: the backends that can be compiled beside the dense model.

Run: python benchmarks/compiled_decoding.py float32; SmolLM2, E 8, K 2, A 64, batch 1. Needs a C++ compiler; five
minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from pesc.allocator import keep_freed_memory
from pesc.bench.config import BenchConfig
from pesc.bench.subjects import DENSE, build_subject, load_base, use_backend
from pesc.bench.timing import interleave

BACKENDS = ("auto", "wide_mm", "batched_mm")
TOKENS, ROUNDS = 24, 8


def decoding(model: Any) -> Callable[[], None]:
    """Writes TOKENS tokens, one after the other, through a compiled forward pass."""
    cache = StaticCache(config=model.config, max_cache_len=TOKENS)
    forward = torch.compile(model.forward, dynamic=False)

    @torch.no_grad()
    def decode() -> None:
        cache.reset()
        ids = torch.tensor([[5]])
        for position in range(TOKENS):
            places = {"position_ids": torch.tensor([[position]]), "cache_position": torch.tensor([position])}
            logits = forward(input_ids=ids, past_key_values=cache, use_cache=True, **places).logits
            ids = logits[:, -1:].argmax(-1)

    return decode


def main() -> None:
    """Compile all forms, time them in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    dtype = getattr(torch, parser.parse_args().dtype)
    keep_freed_memory()
    config = BenchConfig()
    subject = build_subject(load_base(config.model, dtype), config.method, lora=False, upcycle=False)
    models = {DENSE: subject.dense}
    for backend in BACKENDS:
        # A copy for each: a compiled model must not change its backend.
        models[backend] = copy.deepcopy(subject.crafted)
        use_backend(models[backend], backend)
    timings = interleave({name: decoding(model) for name, model in models.items()}, ROUNDS)
    print("| form | time, relative to dense | quartiles |\n|---|---|---|")
    for name, timing in timings.items():
        ratio, low, high = timing.ratio(timings[DENSE])
        print(f"| {name} | {ratio:.2f} | {low:.2f} to {high:.2f} |")


if __name__ == "__main__":
    main()
