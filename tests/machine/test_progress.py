"""Progress: a bar on a terminal, and in a log a line often enough to see that the work goes on."""

from __future__ import annotations

import io
import re
import time

from rich.console import Console

from pesc.machine.progress import Progress


def log() -> Console:
    return Console(file=io.StringIO(), width=20)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_a_log_gets_a_line_at_the_first_and_the_last_step() -> None:
    console = log()
    with Progress(console, "train", 40, done=10) as progress:
        for step in range(11, 41):
            progress.update(step, f"loss {step} of a model with a long status")
    first, last = lines(console)
    assert re.fullmatch(r"train  11/40  loss 11 of a model with a long status  \d:\d\d:\d\d left", first)
    assert last == "train  40/40  loss 40 of a model with a long status"


def test_a_log_gets_a_line_every_interval_also_while_a_step_lasts() -> None:
    console = log()
    with Progress(console, "train", 3, status="first step …", interval=0.02) as progress:
        wait_for(lambda: len(lines(console)) >= 3)
        assert set(lines(console)) == {"train  0/3  first step …"}
        progress.update(1, "loss 2")
        before = len(lines(console))
        wait_for(lambda: len(lines(console)) >= before + 2)
        assert all(line.startswith("train  1/3  loss 2  0:00:0") for line in lines(console)[before:])
    shown = lines(console)
    time.sleep(0.1)
    assert lines(console) == shown


def test_time_left_counts_only_the_steps_done_here() -> None:
    console = log()
    progress = Progress(console, "train", 1000, done=900)
    progress._start -= 60
    progress.update(910)
    progress.stop()
    assert lines(console) == ["train  910/1000  0:09:00 left"]


def test_a_terminal_gets_a_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=100)
    with Progress(console, "train", 3) as progress:
        progress.update(2, "loss 1")
    shown = console.file.getvalue()
    assert "\x1b[" in shown and "2/3" in shown and "loss 1" in shown


def wait_for(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
