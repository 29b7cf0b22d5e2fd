"""Does sparse beat dense when both train as many parameters? The demo with two more arms, same data, steps and seeds.

The arms are LoRA of a rank that makes up for the experts, and one adapter as wide as all experts together, which every
token uses. Runs of the demo that are in the folder are used; what is missing is trained.
Run: python benchmarks/equal_size.py [--folder runs/demo] [--seeds 0 1 2]; ten minutes a seed after `pesc demo`, on two
cores. Interrupted, it goes on where it was. It writes equal-size/report.html into the folder and prints a table.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pesc.config import PescConfig
from pesc.demo.demo import Stages, demo_mixture, demo_study
from pesc.report import findings
from pesc.report.results import Results
from pesc.study.study import Study, StudyArm, run_study
from pesc.training.recipe import LoraSettings

WIDE_LORA, ADAPTER = "dense + LoRA r 74", "LoRA r 16 and one adapter of 512"


def equal_size_study(folder: Path, seeds: list[int]) -> Study:
    """The demo's PESC and dense + LoRA, and two that train as many parameters without choosing experts."""
    demo = demo_study(folder, seeds, demo_mixture(folder))
    dense, pesc = (arm for arm in demo.arms if arm.recipe is not None)
    assert pesc.recipe is not None and dense.recipe is not None
    lora = replace(dense.recipe, lora=LoraSettings(r=74, alpha=148))
    adapter = replace(
        pesc.recipe, pesc=PescConfig(num_experts=1, num_experts_per_tok=1, adapter_dim=512, router_aux_loss_coef=0.0)
    )
    others = {WIDE_LORA: (lora, "equal-size/lora"), ADAPTER: (adapter, "equal-size/adapter")}
    arms = [StudyArm(name, recipe, place, title=name) for name, (recipe, place) in others.items()]
    return replace(demo, arms=[*arms, dense, pesc], output=folder / "equal-size")


def show(results: Results) -> None:
    """A row for each arm: losses in nats a token, and PESC's difference with its standard error."""
    print(f"| | trained | {' | '.join(f'{domain} | PESC less this' for domain in results.domains)} |")
    print("|---" * (2 + 2 * len(results.domains)) + "|")
    for arm in results.arms:
        cells = [arm.name, findings.count(arm.parameters.trained)]
        for domain, case in zip(results.domains, findings.compare(results, arm), strict=True):
            difference = f"{findings.signed(case.estimate.mean)} ± {findings.number(case.estimate.error)}"
            cells += [findings.over_seeds(results.losses(arm, domain)), "" if arm is results.subject else difference]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing of the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    study, console = equal_size_study(arguments.folder, arguments.seeds), Console(stderr=True)
    show(run_study(study, console, Stages(console, total=5 * len(arguments.seeds))))


if __name__ == "__main__":
    main()
