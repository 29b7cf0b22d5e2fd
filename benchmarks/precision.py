"""What is lost where experts, routers and the optimizer's moments are bfloat16 and not float32.

One step of SmolLM2-135M at the paper's rate, on bfloat16 weights: the share of trained weights that it leaves as they
were. And AdamW alone: its second moment 3,000 steps after the standard deviation of the gradients fell from 1 to 0.1.
Run: python benchmarks/precision.py; some two minutes on two cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from pesc import train
from pesc.crafting.lora import adapter_tensors
from pesc.demo.mixture import build_mixture
from pesc.training.recipe import Recipe
from pesc.training.train import build_model

PARTS = {"router": ".router.", "first matrices": "up_proj", "LoRA's A": "lora_A"}
DTYPES = ("float32", "bfloat16")


def unmoved(folder: Path, data: Path, dtype: str) -> dict[str, float]:
    """By part, the share of values that the third step leaves as they were.

    (In the first, second matrices are zero, and first ones have no gradient.)
    """
    adapters = []
    for steps in (2, 3):
        recipe = Recipe.from_dict(
            {
                "model": {"name": "smollm2-135m-instruct", "dtype": "bfloat16"},
                "pesc": {"adapter_dim": 64},
                "data": {"train": str(data), "max_length": 256},
                "training": {
                    "trained_dtype": dtype,
                    "steps": steps,
                    "lr_scheduler_type": "constant",
                    "warmup_ratio": 0.0,
                },
                "output": {"folder": str(folder / f"{dtype}-{steps}")},
            }
        )
        adapters.append(load_file(train(recipe, Console(quiet=True)) / "adapter.safetensors"))
    assert adapters[0].keys() == adapter_tensors(build_model(recipe)).keys()
    return {part: _equal([name for name in adapters[0] if mark in name], *adapters) for part, mark in PARTS.items()}


def _equal(names: list[str], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    same = sum(int((before[name] == after[name]).sum()) for name in names)
    return same / sum(before[name].numel() for name in names)


def second_moment(dtype: str) -> float:
    """Mean second moment at the end; 0.999^3000 + 0.01 (1 - 0.999^3000) = 0.059 would be right."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(1000, dtype=getattr(torch, dtype)))
    optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0)
    for step in range(6000):
        deviation = 1.0 if step < 3000 else 0.1
        weight.grad = (torch.randn(1000, generator=generator) * deviation).to(weight.dtype)
        optimizer.step()
    return float(optimizer.state[weight]["exp_avg_sq"].float().mean())


def main() -> None:
    """Print a table."""
    print(f"| what trains is | {' | '.join(f'{part} unmoved' for part in PARTS)} | second moment, of 0.059 |")
    print("|---" * (len(PARTS) + 2) + "|")
    with tempfile.TemporaryDirectory() as folder:
        data = build_mixture(Path(folder), 20, 10, 0).train
        for dtype in DTYPES:
            shares = unmoved(Path(folder), data, dtype)
            print(
                f"| {dtype} | {' | '.join(f'{100 * s:.1f} %' for s in shares.values())} | {second_moment(dtype):.4f} |"
            )


if __name__ == "__main__":
    main()
