"""Studies of tiny models: every run once, in its own folder, resumable, and readable at any moment."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pesc.study.study as module
from checkpoints import tiny_dense, write_rows
from pesc import PescConfig, load
from pesc.report.results import Results, read_results
from pesc.study.study import Study, StudyArm, run_study
from pesc.training.recipe import DataSettings, LoraSettings, ModelSettings, OutputSettings, Recipe, TrainingSettings

PESC, DENSE, BASE = "PESC", "dense + LoRA", "base"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    dense = tiny_dense(tmp_path / "dense")
    recipe = Recipe(
        model=ModelSettings(name=str(dense)),
        pesc=PescConfig(num_experts=4, adapter_dim=8, layers=[1]),
        lora=LoraSettings(r=2, alpha=4),
        data=DataSettings(train=write_rows(tmp_path / "train.jsonl"), max_length=128),
        training=TrainingSettings(steps=3, batch_size=2, learning_rate=1e-2),
        output=OutputSettings(folder=tmp_path),
    )
    return Study(
        folder=tmp_path / "study",
        model=str(dense),
        arms=[
            StudyArm(BASE, folder="base", title="as it is"),
            StudyArm(PESC, recipe, title="crafted"),
            StudyArm(DENSE, replace(recipe, pesc=None), folder="lora", title="LoRA alone"),
        ],
        comparisons=[(PESC, DENSE), (PESC, BASE)],
        seeds=[0, 1],
        held_out=write_rows(tmp_path / "held_out.jsonl", count=6),
        max_length=128,
        questions_per_domain=1,
        answer_tokens=4,
    )


class Stages:
    """The titles of the stages; stops before the one that holds `stop`."""

    def __init__(self, stop: str | None = None) -> None:
        self.titles: list[str] = []
        self.stop = stop

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        if self.stop and self.stop in title:
            raise KeyboardInterrupt
        self.titles.append(title)
        yield


def run(study: Study, stages: Stages | None = None) -> tuple[Results, str]:
    console = Console(file=io.StringIO(), width=200)
    return run_study(study, console, stages or Stages()), console.file.getvalue()


def test_every_arm_runs_with_every_seed(study: Study) -> None:
    stages = Stages()
    results, _ = run(study, stages)
    assert stages.titles == [
        "as it is",
        "crafted, seed 0",
        "LoRA alone, seed 0",
        "Report",
        "crafted, seed 1",
        "LoRA alone, seed 1",
        "Report",
    ]
    assert [(r.arm, r.seed, r.folder) for r in results.runs] == [
        (BASE, None, "base"),
        (PESC, 0, "."),
        (DENSE, 0, "lora"),
        (PESC, 1, "seed-1"),
        (DENSE, 1, "seed-1/lora"),
    ]
    assert results == read_results(study.folder)
    assert (study.folder / "report.html").is_file()
    pesc = results.of(PESC)[0].measured
    assert pesc.parameters.trained > results.of(DENSE)[0].measured.parameters.trained > 0
    assert pesc.routing is not None and pesc.routing.layers == [1]
    assert [len(r.measured.answers) for r in results.runs] == [2] * 5
    assert results.differences(PESC, DENSE, "odd").shape == (2, 3)
    assert results.of(PESC)[0].measured.nll != results.of(PESC)[1].measured.nll
    assert load(study.folder).config.method.num_experts == 4
    settings = {arm.name: arm.settings for arm in results.arms}
    assert settings[PESC]["pesc.adapter_dim"] == "8" and "pesc.adapter_dim" not in settings[DENSE]
    assert settings[BASE] == {}


def test_an_interrupted_study_goes_on_and_gives_the_same(study: Study) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(study, Stages(stop="LoRA alone, seed 1"))
    so_far = read_results(study.folder)
    assert [run.arm for run in so_far.runs] == [BASE, PESC, DENSE, PESC]
    assert so_far.seeds(PESC, DENSE) == [0]
    whole, text = run(study)
    assert text.count("complete: nothing to do") == 3
    assert whole.runs[:4] == so_far.runs
    again, _ = run(replace(study, folder=study.folder.with_name("again")))
    assert [r.measured.nll for r in again.runs] == [r.measured.nll for r in whole.runs]


def test_runs_are_measured_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    results, _ = run(study)
    monkeypatch.setattr(module, "score", None)
    assert run(study)[0] == results
    monkeypatch.undo()
    changed = replace(study, held_out=write_rows(study.held_out.with_name("other.jsonl"), count=8))
    assert len(run(changed)[0].runs[0].measured.nll) == 8


def test_a_study_may_add_arms_to_the_runs_of_another(study: Study) -> None:
    run(study)
    assert study.arms[2].recipe is not None
    wide = StudyArm("LoRA r 4", replace(study.arms[2].recipe, lora=LoraSettings(r=4, alpha=8)), folder="wide")
    more = replace(study, arms=[*study.arms[1:], wide], comparisons=[(PESC, "LoRA r 4")], output=study.folder / "more")
    results, _ = run(more)
    assert [(r.arm, r.folder) for r in results.runs[:3]] == [(PESC, ".."), (DENSE, "../lora"), ("LoRA r 4", "../wide")]
    assert (study.folder / "more" / "report.html").is_file()
    assert read_results(study.folder).names == [BASE, PESC, DENSE]


def test_arms_of_one_seed_start_alike_and_see_the_same_data(study: Study) -> None:
    run(replace(study, seeds=[3]))
    folders = [study.folder, study.folder / "lora"]
    tokens = [[line["tokens"] for line in map(eval, (f / "metrics.jsonl").read_text().splitlines())] for f in folders]
    assert tokens[0] == tokens[1]
    first = [
        dict(module.train.__globals__["build_model"](study.recipe_of(arm, 3)).named_parameters())
        for arm in study.arms[1:]
    ]
    lora = [name for name in first[1] if "lora" in name]
    assert lora and all(torch.equal(first[0][name], first[1][name]) for name in lora)


def test_examples_without_an_answer_are_told(study: Study) -> None:
    text = study.held_out.read_text()
    study.held_out.write_text(text + text.splitlines()[0].replace("count", "count " * 30) + "\n")
    results, shown = run(replace(study, arms=study.arms[:1], comparisons=[]))
    assert (results.left_out, len(results.examples)) == (1, 6)
    assert "1 held-out examples are left out: truncated to 128 tokens" in shown


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_some_and_differ(study: Study, seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="seeds"):
        replace(study, seeds=seeds)
