"""Where a run reports to: TensorBoard's files say what metrics.jsonl says; and what is printed, and what not."""

from __future__ import annotations

import io
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pesc import train
from pesc.cli import main
from pesc.training.recipe import Reporter
from runs import interrupt_after, make_recipe, metrics


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_tensorboard_gets_every_step_and_every_evaluation(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "held.jsonl").write_text('{"prompt": "count to 3", "completion": "1 2 3"}\n')
    recipe = make_recipe(tmp_path, report_to=["tensorboard"], eval=tmp_path / "held.jsonl", eval_steps=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 5)
        train(recipe, console)
    train(recipe, console)
    events = EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()

    def curve(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(name)}

    lines = metrics(tmp_path / "run")
    steps, evaluations = ([line for line in lines if key in line] for key in ("loss", "held_out"))
    for name in ("loss", "load_entropy", "grad_norm"):
        assert curve(f"train/{name}") == {line["step"]: pytest.approx(line[name], rel=1e-6) for line in steps}
    assert curve("eval/held_loss") == {e["step"]: pytest.approx(e["held_out"]["held"], rel=1e-6) for e in evaluations}
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"logs", "adapter"}
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_reporters_are_those_of_transformers() -> None:
    """Flyte's takes part in a Flyte task alone."""
    assert set(get_args(Reporter)) == set(INTEGRATION_TO_CALLBACK) - {"flyte"}


def test_a_reporter_that_is_not_installed_is_refused_before_the_model_is_loaded(
    tmp_path: Path, console: Console
) -> None:
    recipe = make_recipe(tmp_path, report_to=["dvclive", "tensorboard"], name=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"output.report_to \(dvclive\) must be installed"):
        train(recipe, console)


def test_quiet_leaves_the_last_lines_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_recipe(tmp_path).save(tmp_path / "recipe.yaml")
    capsys.readouterr()
    assert main(["train", str(tmp_path / "recipe.yaml"), "--quiet"]) == 0
    run = tmp_path / "run"
    shown = capsys.readouterr()
    assert shown.out == f"Next:   pesc chat {run}\n        pesc info {run}\n"
    assert shown.err == ""
    assert main(["train", str(tmp_path / "recipe.yaml"), "training.steps=7", "--quiet"]) == 1
    assert "pesc: " in capsys.readouterr().err
