"""Does sparse beat dense when both train as many parameters? Controls for a finished demo, same data, steps and seed.

LoRA of a rank that makes up for the experts, and one adapter as wide as all experts together, used by every token.
Run: python benchmarks/equal_size.py [runs/demo]; ten minutes on two cores. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pesc.config import PescConfig
from pesc.crafting.cost import count_parameters
from pesc.crafting.load import load, load_tokenizer
from pesc.crafting.lora import fold
from pesc.data.formats import read_examples
from pesc.demo.demo import demo_recipe
from pesc.demo.mixture import DOMAINS
from pesc.evaluation.held_out import Scores, paired_difference, score_rows
from pesc.machine.quiet import quiet_libraries
from pesc.training.recipe import LoraSettings, Recipe
from pesc.training.train import train


def controls(demo: Recipe) -> dict[str, Recipe]:
    """The demo's recipe, changed to train as many parameters without choosing among experts."""
    wide = PescConfig(num_experts=1, num_experts_per_tok=1, adapter_dim=512, router_aux_loss_coef=0.0)
    folder = demo.output.folder / "equal-size"
    lora, adapter = (replace(demo.output, folder=folder / name) for name in ("lora", "adapter"))
    return {
        "dense + LoRA r 74": replace(demo, output=lora, pesc=None, lora=LoraSettings(r=74, alpha=148)),
        "LoRA r 16 and one adapter of 512": replace(demo, output=adapter, pesc=wide),
    }


def score(run: Path, demo: Recipe) -> tuple[Scores, int]:
    """(held-out scores, trained parameters) of a finished run."""
    rows = read_examples(demo.output.folder / "data" / "held_out.jsonl")
    with quiet_libraries():
        model = load(run)
        trained = count_parameters(model).trained
        fold(model)
        return score_rows(model, load_tokenizer(demo.model.name), rows, max_length=demo.data.max_length), trained


def main() -> None:
    """Train the controls that are missing and print each one's row as soon as it is known."""
    demo = demo_recipe(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
    console = Console(stderr=True)
    pesc, trained = score(demo.output.folder, demo)
    print(f"| | trained | {' | '.join(f'{domain} | PESC less this' for domain in DOMAINS)} |")
    print("|---" * (2 + 2 * len(DOMAINS)) + "|")
    show("PESC, 8 experts of 64, top 2", pesc, trained, pesc)
    show("dense + LoRA r 16", *score(demo.output.folder / "dense", demo), pesc)
    for name, recipe in controls(demo).items():
        train(recipe, console, label=name)
        show(name, *score(recipe.output.folder, demo), pesc)


def show(name: str, scores: Scores, trained: int, pesc: Scores) -> None:
    """A row of the table: losses in nats a token, and the mean difference of a row with its standard error."""
    cells = [name, f"{trained / 1e6:.1f} M"]
    differences = paired_difference(pesc, scores)
    for domain in DOMAINS:
        mean, error = differences[domain]
        cells += [f"{scores.loss()[domain]:.3f}", "" if scores is pesc else f"{mean:+.3f} ± {error:.3f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
