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
from pesc.data.settings import DataSettings
from pesc.report.results import Results, read_metrics, read_results
from pesc.study.study import Study, StudyArm, run_study
from pesc.training.recipe import LoraSettings, ModelSettings, OutputSettings, Recipe, TrainingSettings
from pesc.training.train import build_model

PESC, DENSE, BASE = "PESC", "dense + LoRA", "base"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    dense = tiny_dense(tmp_path / "dense")
    recipe = Recipe(
        model=ModelSettings(name=str(dense)),
        pesc=PescConfig(num_experts=4, adapter_dim=8, layers=[1]),
        lora=LoraSettings(r=2, alpha=4),
        data=DataSettings(train=str(write_rows(tmp_path / "train.jsonl")), max_length=128),
        training=TrainingSettings(steps=3, batch_size=2, learning_rate=1e-2),
        output=OutputSettings(folder=tmp_path),
    )
    return Study(
        folder=tmp_path / "study",
        model=str(dense),
        arms=[
            StudyArm(BASE, folder="base", title="as it is"),
            StudyArm(DENSE, replace(recipe, pesc=None), folder="lora", title="LoRA alone"),
            StudyArm(PESC, recipe, title="crafted"),
        ],
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
        "LoRA alone, seed 0",
        "crafted, seed 0",
        "Report",
        "LoRA alone, seed 1",
        "crafted, seed 1",
        "Report",
    ]
    assert [(arm.name, run.seed, run.folder) for arm, run in results.runs()] == [
        (BASE, None, "base"),
        (DENSE, 0, "lora"),
        (DENSE, 1, "seed-1/lora"),
        (PESC, 0, "."),
        (PESC, 1, "seed-1"),
    ]
    assert results == read_results(study.folder)
    assert (study.folder / "report.html").is_file()
    _, dense, pesc = results.arms
    assert pesc.parameters.trained > dense.parameters.trained > 0
    assert pesc.runs[0].experts is not None and pesc.runs[0].experts.layers == [1]
    assert [len(run.answers) for _, run in results.runs()] == [2] * 5
    assert results.differences(dense, "odd").shape == (2, 3)
    assert pesc.runs[0].nll != pesc.runs[1].nll
    assert load(study.folder).config.pesc_config.num_experts == 4
    assert pesc.settings["pesc.adapter_dim"] == "8" and "pesc.adapter_dim" not in dense.settings
    assert results.arms[0].settings == {}


def test_an_interrupted_study_goes_on_and_gives_the_same(study: Study) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(study, Stages(stop="crafted, seed 1"))
    so_far = read_results(study.folder)
    assert [len(arm.runs) for arm in so_far.arms] == [1, 2, 1]
    assert so_far.differences(so_far.others[0], "odd").shape == (1, 3)
    whole, text = run(study)
    assert text.count("complete: nothing to do") == 3
    assert whole.arms[:2] == so_far.arms[:2]
    again, _ = run(replace(study, folder=study.folder.with_name("again")))
    assert [run.nll for _, run in again.runs()] == [run.nll for _, run in whole.runs()]


def test_runs_are_measured_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study = replace(study, seeds=[0])
    results, _ = run(study)
    monkeypatch.setattr(module, "score", None)
    assert run(study)[0] == results
    monkeypatch.undo()
    (study.folder / "scores.json").write_text("{")
    again, text = run(study)
    assert again == results
    assert text.count("measuring again") == 1 and "study/scores.json: Invalid JSON" in text
    changed = replace(study, held_out=write_rows(study.held_out.with_name("other.jsonl"), count=8))
    assert len(run(changed)[0].subject.runs[0].nll) == 8


def test_a_study_may_add_arms_to_the_runs_of_another(study: Study) -> None:
    study = replace(study, seeds=[0])
    run(study)
    _, dense, pesc = study.arms
    assert dense.recipe is not None
    wide = StudyArm("LoRA r 4", replace(dense.recipe, lora=LoraSettings(r=4, alpha=8)), folder="wide")
    results, text = run(replace(study, arms=[wide, dense, pesc], output=study.folder / "more"))
    assert [(arm.name, run.folder) for arm, run in results.runs()] == [
        ("LoRA r 4", "../wide"),
        (DENSE, "../lora"),
        (PESC, ".."),
    ]
    assert text.count("complete: nothing to do") == 2
    assert (study.folder / "more" / "report.html").is_file()
    assert [arm.name for arm in read_results(study.folder).arms] == [BASE, DENSE, PESC]


def test_arms_of_one_seed_start_alike_and_see_the_same_data(study: Study) -> None:
    run(replace(study, seeds=[3]))
    dense, pesc = (read_metrics(folder) for folder in (study.folder / "lora", study.folder))
    assert dense["tokens"].tolist() == pesc["tokens"].tolist()
    assert dense["loss"][0] == pytest.approx(pesc["loss"][0], rel=1e-6)
    one, two = (dict(build_model(study.recipe_of(arm, 3)).named_parameters()) for arm in study.arms[1:])
    lora = [name for name in one if "lora" in name]
    assert lora and all(torch.equal(one[name], two[name]) for name in lora)


def test_examples_without_an_answer_are_told(study: Study) -> None:
    text = study.held_out.read_text()
    study.held_out.write_text(text + text.splitlines()[0].replace("count", "count " * 30) + "\n")
    results, shown = run(replace(study, arms=study.arms[:1]))
    assert (results.left_out, len(results.examples)) == (1, 6)
    assert "1 held-out examples are left out: truncated to 128 tokens" in shown


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_some_and_differ(study: Study, seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="seeds"):
        replace(study, seeds=seeds)
