"""The main job end to end: craft, tune, compare, look."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pesc.config import PescConfig
from pesc.crafting.cost import count_parameters
from pesc.crafting.embedded import EMBEDDED
from pesc.crafting.load import load, locate
from pesc.crafting.lora import fold
from pesc.crafting.sources import resolve
from pesc.data.formats import read_examples
from pesc.demo.mixture import DOMAINS, MixtureInfo, build_mixture
from pesc.evaluation.held_out import Scores, paired_difference, score_rows
from pesc.evaluation.samples import generate_answers
from pesc.machine.memory import measure_peak_memory
from pesc.machine.quiet import quiet_libraries
from pesc.report.page import write_report
from pesc.training.recipe import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    OutputSettings,
    Recipe,
    TrainingSettings,
)
from pesc.training.train import SUMMARY, train

ROWS_PER_DOMAIN = 100
HELD_OUT_PER_DOMAIN = 32
QUESTIONS_PER_DOMAIN = 2
ANSWER_TOKENS = 128
BASE, DENSE, PESC = "base", "dense + LoRA", "PESC"
_TITLES = {BASE: "base model", DENSE: "dense model with LoRA alone", PESC: "crafted model (PESC)"}


def demo_recipe(output: Path) -> Recipe:
    """The demo's training run; recipes/demo.yaml says the same, with comments."""
    return Recipe(
        model=ModelSettings(name=EMBEDDED),
        pesc=PescConfig(num_experts=8, num_experts_per_tok=2, adapter_dim=64),
        lora=LoraSettings(r=16, alpha=32),
        data=DataSettings(train=output / "data" / "train.jsonl", max_length=512),
        training=TrainingSettings(batch_size=4, learning_rate=1e-3, max_grad_norm=1.0, seed=0),
        output=OutputSettings(folder=output, save_steps=25),
    )


def dense_recipe(recipe: Recipe) -> Recipe:
    """The same run for the dense model with LoRA alone."""
    folder = recipe.output.folder / "dense"
    return dataclasses.replace(recipe, pesc=None, output=dataclasses.replace(recipe.output, folder=folder))


@dataclass
class _Stages:
    """Shows and times the stages of the demo."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    gigabytes: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        self.console.print(f"[bold]{title}[/bold]")
        start = time.perf_counter()
        with measure_peak_memory() as peak:
            yield
        self.seconds[name], self.gigabytes[name] = time.perf_counter() - start, peak.gigabytes
        self.console.print(f"  [dim]{self.seconds[name]:.0f} s, peak memory {peak.gigabytes:.1f} GB[/dim]")


def run_demo(output: Path, console: Console) -> Path:
    """Run the demo, or what an interrupted one has left to do.

    Args:
        output: the run's folder.
        console: where progress and the table are shown.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: when a package of `make setup` is missing, with the command that installs it.
    """
    stages = _Stages(console)
    with stages.stage("model", f"1/6  The dense model: {EMBEDDED}"), quiet_libraries():
        resolve(EMBEDDED)
    with stages.stage("data", "2/6  Three domains: chat, code, math"):
        mixture = build_mixture(output / "data", ROWS_PER_DOMAIN, HELD_OUT_PER_DOMAIN, seed=0)
        console.print(f"  {_counts(mixture)}; {mixture.contaminated_rows} math rows left out as contaminated")
    recipe = demo_recipe(output)
    with stages.stage("pesc", "3/6  Craft: 8 experts, top 2; tune experts and LoRA"):
        train(recipe, console, label="  PESC ")
    with stages.stage("dense", "4/6  The same data, order, steps and seed for the dense model with LoRA alone"):
        train(dense_recipe(recipe), console, label="  dense")
    with stages.stage("compare", "5/6  Held-out loss and answers"):
        results = _compare(output, recipe, mixture, console)
    with stages.stage("report", "6/6  Report"):
        _write_json(output / "results.json", results)
        report = write_report(output)
    _write_json(output / "stages.json", {"seconds": stages.seconds, "peak_memory_gb": stages.gigabytes})
    _show(results, output, report, console)
    return report


def _compare(output: Path, recipe: Recipe, mixture: MixtureInfo, console: Console) -> dict[str, Any]:
    rows = read_examples(mixture.held_out)
    questions = [row for domain in DOMAINS for row in _first(rows, domain, QUESTIONS_PER_DOMAIN)]
    tokenizer = locate(EMBEDDED).tokenizer()
    scores: dict[str, Scores] = {}
    models, answers = [], {}
    for name, path in ((BASE, EMBEDDED), (DENSE, output / "dense"), (PESC, output)):
        console.print(f"  {_TITLES[name]} …")
        with quiet_libraries():
            model = load(path)
        counts = dataclasses.asdict(count_parameters(model))
        fold(model)
        scores[name] = score_rows(model, tokenizer, rows, max_length=recipe.data.max_length)
        prompts = [row["messages"][0]["content"] for row in questions]
        answers[name] = generate_answers(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS)
        models.append({"name": name, "loss": scores[name].loss(), "parameters": counts})
    _write_json(output / "routing.json", _routing(scores[PESC], recipe))
    _write_json(
        output / "answers.json",
        [
            {
                "domain": row["domain"],
                "prompt": row["messages"][0]["content"],
                "reference": row["messages"][-1]["content"],
                "base": answers[BASE][i],
                "dense": answers[DENSE][i],
                "pesc": answers[PESC][i],
            }
            for i, row in enumerate(questions)
        ],
    )
    return {
        "domains": list(DOMAINS),
        "models": models,
        "held_out_tokens": scores[BASE].tokens(),
        "held_out_rows": dict(mixture.counts["held_out"]),
        "uncertainty": {
            f"{one} - {other}": paired_difference(scores[one], scores[other])
            for one, other in ((PESC, DENSE), (PESC, BASE), (DENSE, BASE))
        },
        "setup": _setup(recipe, output),
        "data": _data(mixture),
    }


def _first(rows: list[dict[str, Any]], domain: str, count: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["domain"] == domain][:count]


def _setup(recipe: Recipe, output: Path) -> dict[str, Any]:
    assert recipe.pesc is not None
    assert recipe.lora is not None
    summaries = {name: _read_json(run / SUMMARY) for name, run in (("pesc", output), ("dense", output / "dense"))}
    return {
        "model": recipe.model.name,
        "num_experts": recipe.pesc.num_experts,
        "num_experts_per_tok": recipe.pesc.num_experts_per_tok,
        "adapter_dim": recipe.pesc.adapter_dim,
        "lora_r": recipe.lora.r,
        "learning_rate": recipe.training.learning_rate,
        "batch_size": recipe.training.batch_size,
        "dtype": recipe.model.dtype,
        "steps": summaries["pesc"]["steps"],
        "tokens": summaries["pesc"]["tokens"],
        "seconds": {name: summary["seconds"] for name, summary in summaries.items()},
        "peak_memory_gb": {name: summary["peak_memory_gb"] for name, summary in summaries.items()},
        "seed": recipe.training.seed,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}" + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }


def _data(mixture: MixtureInfo) -> dict[str, Any]:
    dropped = ", ".join(str(template) for template in sorted(mixture.contaminated_templates))
    return {
        "sources": [
            {"domain": domain, "source": mixture.sources[domain], "licence": mixture.licences[domain]}
            for domain in DOMAINS
        ],
        "notes": [
            f"The math generator rewords GSM8K test questions: its templates {dropped} overlap evaluation cases and "
            f"were left out ({mixture.contaminated_rows} rows passed over while drawing).",
            "Held-out math rows come from the same templates as the training rows, with other numbers and names.",
        ],
    }


def _routing(scores: Scores, recipe: Recipe) -> dict[str, Any]:
    assert recipe.pesc is not None
    shares = {
        domain: [(layer.double() / layer.sum()).tolist() for layer in scores.counts[domain]] for domain in DOMAINS
    }
    return {
        "num_experts": recipe.pesc.num_experts,
        "num_experts_per_tok": recipe.pesc.num_experts_per_tok,
        "shares": shares,
    }


def _show(results: dict[str, Any], output: Path, report: Path, console: Console) -> None:
    table = Table(title="Held-out loss (nats a token; lower is better)")
    table.add_column("")
    for domain in results["domains"]:
        table.add_column(domain, justify="right")
    for column in ("total", "active", "trained"):
        table.add_column(column, justify="right")
    for model in results["models"]:
        losses = [f"{model['loss'][domain]:.3f}" for domain in results["domains"]]
        sizes = [f"{model['parameters'][key] / 1e6:.1f} M" for key in ("total", "active", "trained")]
        table.add_row(_TITLES[model["name"]], *losses, *sizes)
    console.print(table)
    for domain, (mean, error) in results["uncertainty"][f"{PESC} - {DENSE}"].items():
        console.print(f"  {domain}: PESC against dense + LoRA {mean:+.4f} ± {error:.4f}: {_verdict(mean, error)}")
    console.print(f"\nReport: {report}\nNext:   pesc chat {output}\n        pesc info {output}", highlight=False)


def _verdict(mean: float, error: float) -> str:
    if not abs(mean) >= 2 * error:
        return "no clear difference"
    return "sparse wins" if mean < 0 else "sparse loses"


def _counts(mixture: MixtureInfo) -> str:
    train_rows, held_out = mixture.counts["train"], mixture.counts["held_out"]
    return ", ".join(f"{domain} {train_rows[domain]} rows and {held_out[domain]} held out" for domain in DOMAINS)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
