"""The demo end to end, on the real model with a handful of rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pesc import load
from pesc.crafting.info import describe
from pesc.demo import demo as run


@pytest.mark.slow
def test_the_demo_runs_end_to_end_and_a_second_time_from_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROWS_PER_DOMAIN", 4)
    monkeypatch.setattr(run, "HELD_OUT_PER_DOMAIN", 2)
    monkeypatch.setattr(run, "QUESTIONS_PER_DOMAIN", 1)
    monkeypatch.setattr(run, "ANSWER_TOKENS", 8)
    console = Console(file=io.StringIO(), width=120)
    output = tmp_path / "demo"
    report = run.run_demo(output, console)
    results = json.loads((output / "results.json").read_text())
    base, dense, sparse = results["models"]
    assert [model["name"] for model in results["models"]] == ["base", "dense + LoRA", "PESC"]
    assert base["loss"].keys() == {"chat", "code", "math"}
    assert base["parameters"]["trained"] == 0 < dense["parameters"]["trained"] < sparse["parameters"]["trained"]
    assert sparse["parameters"]["active"] < sparse["parameters"]["total"]
    assert "PESC" in report.read_text()
    text = console.file.getvalue()
    assert f"pesc chat {output}" in text.replace("\n", "")
    assert describe(output).untouched == [] or len(describe(output).untouched) < 240
    assert load(output).config.method.num_experts == 8
    run.run_demo(output, console)
    assert "complete: nothing to do" in console.file.getvalue()
    again = json.loads((output / "results.json").read_text())
    assert again["models"] == results["models"]
