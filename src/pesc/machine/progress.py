"""How far long work is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

from rich import progress as rich_progress
from rich.console import Console


class Progress:
    """Shows the steps of one piece of work, until `stop` or the end of a `with` block.

    A terminal gets a bar. Elsewhere, as in a log file, a plain line tells the first step and the last, and one appears
    every `interval` seconds between them, however long a step takes.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        total: int,
        *,
        done: int = 0,
        status: str = "",
        transient: bool = False,
        interval: float = 30.0,
    ) -> None:
        """
        Args:
            console: where to show it.
            label: of the work.
            total: all steps.
            done: steps done before; they do not count in the time left.
            status: shown until the first step is done.
            transient: whether the bar disappears at the end.
            interval: seconds between plain lines.
        """
        self._console, self._label, self._total, self._interval = console, label, total, interval
        self._start, self._first, self._done, self._status = time.perf_counter(), done, done, status
        self._stopped = threading.Event()
        self._bar: rich_progress.Progress | None = None
        if console.is_interactive or console.is_jupyter:
            self._bar = _bar(console, transient)
            self._task = self._bar.add_task(label, total=total, completed=done, status=status)
            self._bar.start()
        else:
            self._thread = threading.Thread(target=self._print_at_intervals, daemon=True)
            self._thread.start()

    def update(self, done: int, status: str = "") -> None:
        """Tell that `done` of all steps are done."""
        is_first = self._done == self._first
        self._done, self._status = done, status
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif is_first or done == self._total:
            self._print()

    def stop(self) -> None:
        """Show nothing more; also after an interruption, and more than once."""
        self._stopped.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._thread.join()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _print_at_intervals(self) -> None:
        while not self._stopped.wait(self._interval):
            self._print()

    def _print(self) -> None:
        done, steps = self._done, self._done - self._first
        parts = [self._label, f"{done}/{self._total}", self._status]
        if steps and done < self._total:
            seconds = (time.perf_counter() - self._start) / steps * (self._total - done)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        self._console.print("  ".join(part for part in parts if part), highlight=False, markup=False, soft_wrap=True)


def _bar(console: Console, transient: bool) -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[status]}", markup=False),
        rich_progress.TimeRemainingColumn(compact=True),
        rich_progress.TextColumn("left"),
        console=console,
        refresh_per_second=2,
        transient=transient,
    )
