"""Two runs on one folder, and signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from verbs import STEPS, Verb

Makers = dict[str, Callable[[str], Verb]]


def wait_for(done: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_for_steps(run: Path, steps: int) -> None:
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= steps)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_to_the_same_end(
    number: int, code: int, verbs: Makers, undisturbed: dict[str, Verb]
) -> None:
    verb = verbs["train"](f"signal-{code}")
    run, process = verb.out.parent, verb.start()
    wait_for_steps(run, 4)
    other = Verb("train", verb.folder.with_name(f"other-{code}"), verb.arguments, verb.out)
    assert other.run() == 1
    assert other.errors.startswith(f"pesc: process {process.pid} on ") and other.one_line()
    assert f"is at work on {run}: wait for it, or stop it" in other.errors
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == code
    notice, last = verb.errors.strip().splitlines()
    assert notice == "stopping after this step; Ctrl-C stops at once"
    step = int(last.split()[3])
    assert last == f"stopped after step {step} of {STEPS}: the same command goes on from there"
    assert (run / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert verb.run() == 0
    assert verb.state() == undisturbed["train"].state()


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(verbs: Makers) -> None:
    verb = verbs["train"]("twice")
    process = verb.start()
    wait_for_steps(verb.out.parent, 2)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 130
    assert "Traceback" not in verb.errors
