"""The demo end to end, on the real model with a handful of examples."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pesc import load
from pesc.crafting.info import describe
from pesc.demo import demo as run
from pesc.report import findings
from pesc.report.results import read_results
from pesc.storage.lock import locked


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock").write_text("1 elsewhere")
        with pytest.raises(BlockingIOError, match=f"process 1 elsewhere is at work on {tmp_path}: wait for it"):
            run.run_demo(tmp_path, Console(file=io.StringIO()))


@pytest.mark.slow
def test_the_demo_runs_end_to_end_and_a_second_time_from_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "EXAMPLES_PER_DOMAIN", 4)
    monkeypatch.setattr(run, "HELD_OUT_PER_DOMAIN", 2)
    monkeypatch.setattr(run, "QUESTIONS_PER_DOMAIN", 1)
    monkeypatch.setattr(run, "ANSWER_TOKENS", 8)
    console = Console(file=io.StringIO(), width=120)
    output = tmp_path / "demo"
    report = run.run_demo(output, console)
    results = read_results(output)
    assert [arm.name for arm in results.arms] == ["base", "dense + LoRA", "PESC"]
    assert results.domains == ["chat", "code", "math"]
    base, dense, sparse = (arm.parameters for arm in results.arms)
    assert base.trained == 0 < dense.trained < sparse.trained
    assert sparse.active < sparse.total
    text = console.file.getvalue()
    assert all(f"{stage}/6  " in text for stage in range(1, 7))
    joined = text.replace("\n", "")
    assert f"pesc chat {output}" in joined
    # Terminal and report say the same.
    page = report.read_text()
    for sentence in (findings.headline(results), findings.ONE_SEED):
        assert sentence in page
        assert sentence.replace(" ", "") in joined.replace(" ", "")
    assert "sparse wins" not in text.lower()
    assert describe(output).untouched == [] or len(describe(output).untouched) < 240
    assert load(output).config.pesc_config.num_experts == 8
    run.run_demo(output, console)
    assert "complete: nothing to do" in console.file.getvalue()
    assert read_results(output) == results
