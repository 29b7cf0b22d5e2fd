"""The main job end to end: craft, tune, compare, look."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pesc.config import PescConfig
from pesc.crafting.embedded import EMBEDDED
from pesc.crafting.load import locate
from pesc.data.settings import DataSettings
from pesc.demo.mixture import DOMAINS, LICENCES, SOURCES, MixtureInfo, build_mixture
from pesc.machine.memory import measure_peak_memory
from pesc.machine.quiet import quiet_libraries
from pesc.report import findings
from pesc.report.page import PAGE
from pesc.report.results import Results, Source
from pesc.storage.files import write_json
from pesc.storage.lock import locked
from pesc.study.study import Study, StudyArm, run_study
from pesc.training.recipe import LoraSettings, ModelSettings, OutputSettings, Recipe, TrainingSettings

EXAMPLES_PER_DOMAIN = 100
HELD_OUT_PER_DOMAIN = 32
QUESTIONS_PER_DOMAIN = 2
ANSWER_TOKENS = 128
BASE, DENSE, PESC = "base", "dense + LoRA", "PESC"


def demo_recipe(output: Path) -> Recipe:
    """The demo's training run; recipes/demo.yaml says the same, with comments."""
    return Recipe(
        model=ModelSettings(name=EMBEDDED),
        pesc=PescConfig(num_experts=8, num_experts_per_tok=2, adapter_dim=64),
        lora=LoraSettings(r=16, alpha=32),
        data=DataSettings(train=str(output / "data" / "train.jsonl"), max_length=512),
        training=TrainingSettings(batch_size=4, learning_rate=1e-3, lr_scheduler_type="linear", max_grad_norm=1.0),
        output=OutputSettings(folder=output, save_steps=25),
    )


def demo_study(output: Path, seeds: list[int], mixture: MixtureInfo) -> Study:
    """The demo's three arms; the runs of PESC lie in the folder itself, so that `pesc chat` finds them there."""
    recipe = demo_recipe(output)
    dense = dataclasses.replace(recipe, pesc=None)
    return Study(
        folder=output,
        model=EMBEDDED,
        arms=[
            StudyArm(BASE, folder="base", title="The dense model as it is: held-out loss and answers"),
            StudyArm(DENSE, dense, folder="dense", title="Tune the dense model with LoRA alone; loss and answers"),
            StudyArm(PESC, recipe, title="The same data, order, steps and seed: craft 8 experts, top 2; tune; measure"),
        ],
        seeds=seeds,
        held_out=mixture.held_out,
        max_length=recipe.data.max_length,
        questions_per_domain=QUESTIONS_PER_DOMAIN,
        answer_tokens=ANSWER_TOKENS,
        sources=[Source(domain, SOURCES[domain], LICENCES[domain]) for domain in DOMAINS],
        notes=_notes(mixture),
    )


def demo_mixture(output: Path) -> MixtureInfo:
    """The demo's data, the same for every seed of a run."""
    return build_mixture(output / "data", EXAMPLES_PER_DOMAIN, HELD_OUT_PER_DOMAIN, seed=0)


@dataclass
class Stages:
    """Shows and times the stages of the demo."""

    console: Console
    total: int
    seconds: dict[str, float] = field(default_factory=dict)
    gigabytes: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        self.console.print(
            f"{len(self.seconds) + 1}/{self.total}  {title}", style="bold", highlight=False, markup=False
        )
        start = time.perf_counter()
        with measure_peak_memory() as peak:
            yield
        name = f"{len(self.seconds) + 1} {title}"
        self.seconds[name], self.gigabytes[name] = time.perf_counter() - start, peak.gigabytes
        self.console.print(f"  [dim]{self.seconds[name]:.0f} s, peak memory {peak.gigabytes:.1f} GB[/dim]")


def run_demo(output: Path, console: Console, seeds: list[int] | None = None) -> Path:
    """Run the demo, or what an interrupted one has left to do.

    Args:
        output: the run's folder.
        console: where progress and the table are shown.
        seeds: of the runs, 0 by default; each decides initial values and the order of the data.

    Returns:
        The report's path.

    Raises:
        BlockingIOError: another process works in the folder.
        FileNotFoundError: a package of `make setup` is missing; the message has the command that installs it.
    """
    with locked(output):
        return _run_demo(output, console, seeds or [0])


def _run_demo(output: Path, console: Console, seeds: list[int]) -> Path:
    stages = Stages(console, total=3 + 3 * len(seeds))
    with stages(f"The dense model: {EMBEDDED}"), quiet_libraries():
        locate(EMBEDDED)
    with stages("Three domains: chat, code, math"):
        mixture = demo_mixture(output)
        console.print(
            f"  {_counts(mixture)}; {mixture.math.contaminated_examples} math examples left out as contaminated"
        )
    results = run_study(demo_study(output, seeds, mixture), console, stages)
    write_json(output / "stages.json", {"seconds": stages.seconds, "peak_memory_gb": stages.gigabytes})
    show(results, console)
    report = output / PAGE
    console.print(
        f"\nReport: {report}\nNext:   pesc chat {output}\n        pesc info {output}", highlight=False, markup=False
    )
    return report


def show(results: Results, console: Console) -> None:
    """The results as a table, and what the first comparison says."""
    table = Table(title="Held-out loss (nats a token; lower is better)")
    table.add_column("")
    for column in (*results.domains, "total", "active", "trained"):
        table.add_column(column, justify="right")
    for arm in results.arms:
        losses = [findings.over_seeds(results.losses(arm, domain)) for domain in results.domains]
        table.add_row(arm.name, *losses, *(findings.count(size) for size in dataclasses.astuple(arm.parameters)))
    console.print(table, markup=False)
    comparisons = findings.compare(results, results.others[0])
    console.print(findings.verdict(comparisons), highlight=False, markup=False)
    for case in comparisons:
        console.print(f"  {case.domain}: {case.sentence}", highlight=False, markup=False)
    if comparisons[0].estimate.num_seeds == 1:
        console.print(findings.ONE_SEED, highlight=False)


def _notes(mixture: MixtureInfo) -> list[str]:
    dropped = ", ".join(str(template) for template in sorted(mixture.math.contaminated))
    return [
        f"The math generator rewords GSM8K test questions: its templates {dropped} overlap evaluation cases and were"
        f" left out ({mixture.math.contaminated_examples} examples passed over while drawing).",
        "Held-out math examples come from the same templates as the training examples, with other numbers and names.",
    ]


def _counts(mixture: MixtureInfo) -> str:
    trained, held_out = mixture.counts["train"], mixture.counts["held_out"]
    return ", ".join(f"{domain} {trained[domain]} examples and {held_out[domain]} held out" for domain in DOMAINS)
