"""Does sparse beat dense when both train the same number of parameters? The demo's data and steps, several seeds.

Beside PESC and the demo's dense model with LoRA: LoRA of a rank that makes up for the experts, and one adapter as wide
as all experts together, which every token uses.
Run: python benchmarks/equal_size.py [runs/equal-size]; half an hour on two cores. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from pesc.config import PescConfig
from pesc.crafting.adapter import fold, load
from pesc.crafting.dense import load_tokenizer
from pesc.crafting.parameters import count_parameters
from pesc.demo.mixture import DOMAINS, build_mixture
from pesc.demo.run import HELD_OUT_PER_DOMAIN, ROWS_PER_DOMAIN, demo_recipe
from pesc.evaluation.held_out import RowScore, Scores, paired_difference, score_rows
from pesc.quiet import quiet_libraries
from pesc.training.data import read_rows
from pesc.training.recipe import LoraSettings, Recipe
from pesc.training.train import train

SEEDS = (0, 1, 2)
PESC = "PESC, 8 experts of 64, top 2"


def arms(recipe: Recipe) -> dict[str, Recipe]:
    """The demo's recipe and its controls."""
    return {
        "dense + LoRA r 16": replace(recipe, method=None),
        "dense + LoRA r 74": replace(recipe, method=None, lora=LoraSettings(r=74, alpha=148)),
        "one adapter of 512": replace(
            recipe, method=PescConfig(num_experts=1, num_experts_per_tok=1, adapter_dim=512, router_aux_loss_coef=0.0)
        ),
        PESC: recipe,
    }


def measure(recipe: Recipe, held_out: Path, console: Console) -> tuple[Scores, int]:
    """(held-out scores, trained parameters) of a run, which is trained if it is not there."""
    file = recipe.output / "held_out.json"
    if not file.exists():
        with quiet_libraries():
            model = load(train(recipe, console, label=recipe.output.name))
        trained = count_parameters(model).trained
        fold(model)
        scores = score_rows(model, load_tokenizer(recipe.model), read_rows(held_out), max_length=recipe.max_length)
        file.write_text(json.dumps({"trained": trained, "rows": [asdict(row) for row in scores.rows]}) + "\n")
    values = json.loads(file.read_text())
    return Scores([RowScore(**row) for row in values["rows"]], {}), values["trained"]


def mean_rows(scores: list[Scores]) -> Scores:
    """Every row's loss, averaged over seeds."""
    rows = [
        RowScore(same[0].domain, statistics.mean(row.nll for row in same), same[0].tokens)
        for same in zip(*(score.rows for score in scores), strict=True)
    ]
    return Scores(rows, {})


def main() -> None:
    """Train what is missing and print a table."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/equal-size")
    console = Console(stderr=True)
    demo = demo_recipe(output)
    mixture = build_mixture(output / "data", ROWS_PER_DOMAIN, HELD_OUT_PER_DOMAIN, seed=0)
    found: dict[str, list[Scores]] = {}
    trained: dict[str, int] = {}
    for seed in SEEDS:
        for number, (name, recipe) in enumerate(arms(demo).items()):
            run = replace(recipe, seed=seed, output=output / f"arm-{number}-seed-{seed}")
            scores, trained[name] = measure(run, mixture.held_out, console)
            found.setdefault(name, []).append(scores)
    print("| | trained | " + " | ".join(f"{domain} | PESC less this" for domain in DOMAINS) + " |")
    print("|---" * (2 + 2 * len(DOMAINS)) + "|")
    pesc = mean_rows(found[PESC])
    for name, scores in found.items():
        cells = [name, f"{trained[name] / 1e6:.1f} M"]
        difference = paired_difference(pesc, mean_rows(scores))
        for domain in DOMAINS:
            losses = [score.loss()[domain] for score in scores]
            cells.append(f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})")
            mean, error = difference[domain]
            cells.append("" if name == PESC else f"{mean:+.3f} ± {error:.3f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
