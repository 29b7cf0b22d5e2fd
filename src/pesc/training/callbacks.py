"""What happens beside training: progress, metrics.jsonl, and the stop at a signal."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pesc.machine.progress import Progress
from pesc.storage.files import write_text

METRICS = "metrics.jsonl"
_ROUTING = ("aux_loss", "load_entropy")
_COLLAPSED, _DEAD = "collapsed_layers", "dead_experts"
_NOTHING_YET = {"step": 0, "tokens": 0, "elapsed": 0.0}


class MetricsWriter(TrainerCallback):
    """Appends a line to metrics.jsonl for every optimizer step, and shows it.

    A line holds: step; loss (of the language model alone); learning_rate; grad_norm; tokens (seen so far);
    tokens_per_second; elapsed (seconds, over interruptions); and for crafted models aux_loss (eq. 10 summed over
    layers, without its weight) and load_entropy (see `pesc.method.routing.load_entropy`), and every
    `pesc.training.health.WINDOW` steps collapsed_layers and dead_experts (see `pesc.training.health.starved`). With
    DPO also what it calls rewards, beta times the gain in log-likelihood since the start: rewards/chosen,
    rewards/rejected, rewards/margins (their difference) and rewards/accuracies (the share of pairs where it is above
    0).
    An evaluation appends a line of its own: step; tokens; held_out, the loss of each held-out source by name.
    """

    def __init__(self, path: Path, console: Console, label: str) -> None:
        self.path = path
        self.console = console
        self.label = label
        self.last = _last_step(self._lines())
        self.progress: Progress | None = None
        self._told: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to show progress; drop lines of steps after the checkpoint that the run resumes from."""
        kept = [line for line in self._lines() if line["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.last = _last_step(kept)
        self.before, self.tokens_before = self.last["elapsed"], self.last["tokens"]
        self.start = self.step_start = time.perf_counter()
        self.progress = Progress(
            self.console, self.label, state.max_steps, done=state.global_step, status="first step …"
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write and show one step's numbers."""
        if not logs or "loss" not in logs or self.progress is None:
            return
        line = self._line(state.global_step, logs)
        self._append(line, sync=control.should_save)
        self.last = line
        self._warn(line)
        status = f"loss {line['loss']:.3f}  {line['tokens_per_second']:.0f} tokens/s"
        if "load_entropy" in line:
            status += f"  load entropy {line['load_entropy']:.3f}"
        if "rewards/accuracies" in line:
            status += f"  right preferences {line['rewards/accuracies']:.0%}"
        self.progress.update(state.global_step, status)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Write and show the losses of held-out data."""
        losses = {key.removeprefix("eval_").removesuffix("_loss"): loss for key, loss in metrics.items()}
        mean = losses.pop("loss")
        self._append({"step": state.global_step, "tokens": self.last["tokens"], "held_out": losses}, sync=True)
        named = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        best = ", the lowest so far" if state.best_global_step == state.global_step else ""
        message = f"step {state.global_step}: held-out loss {mean:.4f}{best} ({named})"
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)
        self.step_start = time.perf_counter()

    def summary(self) -> dict[str, Any]:
        """Steps, tokens and seconds of the run so far."""
        return {"steps": self.last["step"], "tokens": self.last["tokens"], "seconds": self.last["elapsed"]}

    def stop(self) -> None:
        """Show no more progress, also after an interruption."""
        if self.progress is not None:
            self.progress.stop()

    def _append(self, line: dict[str, Any], *, sync: bool) -> None:
        """Write a line; `sync` it if a checkpoint follows, which must not outlive the lines up to its step."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            if sync:
                os.fsync(stream.fileno())

    def _warn(self, line: dict[str, Any]) -> None:
        """Name the layers and experts that routing starves, each once."""
        found = [f"layer {index} sends nearly every token to the same experts" for index in line.get(_COLLAPSED, [])]
        found += [f"layer {i}, expert {e}: next to no tokens" for i, dead in line.get(_DEAD, {}).items() for e in dead]
        new = [each for each in found if each not in self._told]
        self._told.update(new)
        if new:
            message = f"step {line['step']}: {'; '.join(new)}. What gets no tokens learns nothing: start again with a "
            message += "higher pesc.router_aux_loss_coef if it stays so"
            self.console.print(message, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def _line(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        now = time.perf_counter()
        elapsed = self.before + now - self.start
        tokens = self.tokens_before + int(logs["num_tokens"])
        line = {
            "step": step,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens": tokens,
            "tokens_per_second": (tokens - self.last["tokens"]) / max(now - self.step_start, 1e-9),
            "elapsed": elapsed,
        }
        self.step_start = now
        line |= {key: float(logs[key]) for key in logs if key in _ROUTING or key.startswith("rewards/")}
        return line | {key: logs[key] for key in (_COLLAPSED, _DEAD) if key in logs}

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for text in self.path.read_text().splitlines() if self.path.is_file() else []:
            with suppress(json.JSONDecodeError):  # an interruption may have cut the last line
                lines.append(json.loads(text))
        return lines


def _last_step(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return [_NOTHING_YET, *(line for line in lines if "loss" in line)][-1]


class Stopped(KeyboardInterrupt):
    """A signal ended a run; its checkpoint holds all that was done.

    Args:
        message: a line for the user.
        number: of the signal.
    """

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
        """What a shell shows for a process that the signal ended."""


class StopAtSignal(TrainerCallback):
    """In a `with` block, makes Ctrl-C and SIGTERM end training after the step in progress, with a checkpoint.

    A second signal acts as if nothing were here. Only the main thread can be interrupted, so in another one signals are
    left alone.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopAtSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end, if a signal has come."""
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
        os.write(2, b"\nstopping after this step; Ctrl-C stops at once\n")  # print could meet a print in progress
