"""Verbs of the command in processes of their own, disturbed at a chosen access to files.

The processes are forks of one that has imported everything, so each starts at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import tiny_dense, write_rows
from pesc.cli import main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pesc.crafting.craft_checkpoint",
        "pesc.crafting.show",
        "pesc.interop.formats",
        "pesc.training.train",
        "transformers.models.llama.modeling_llama",
    ]
)
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}
STEPS, SAVE_STEPS = 24, 3


@dataclass(frozen=True)
class Disturbance:
    """What happens to a process, and when."""

    at: int = 0
    """The access to files below the verb's folder before which it happens, counted from 1; 0 for never."""
    how: str = "kill"
    """"kill": kill -9; "vanish": the verb's folder is removed."""
    file_size: int = -1
    """The largest file that the process may write, in bytes."""
    obey_modes: bool = False
    """Whether a read-only folder is one for root, too."""


@dataclass
class Verb:
    """A command line that writes `out` in a folder of its own."""

    name: str
    folder: Path
    arguments: list[str]
    out: Path

    def start(self, disturbance: Disturbance = Disturbance()) -> Any:
        """Start the command; its output goes to files beside its folder."""
        process = FORKS.Process(target=_run, args=(self.arguments, self.folder, disturbance))
        process.start()
        return process

    def run(self, disturbance: Disturbance = Disturbance()) -> int:
        """Run the command to its end."""
        process = self.start(disturbance)
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    @property
    def errors(self) -> str:
        """What the last process wrote to stderr."""
        return self.folder.with_suffix(".err").read_text()

    @property
    def accesses(self) -> int:
        """How often the last process, which ended by itself, accessed files below the folder."""
        return int(self.folder.with_suffix(".count").read_text())

    def one_line(self) -> bool:
        """Whether the last process gave one line for an error."""
        return self.errors.startswith("pesc: ") and self.errors.count("\n") == 1

    def state(self) -> dict[str, str]:
        """What is in the folder: names, and digests of content that is the same in every run."""
        return {str(p.relative_to(self.folder)): _digest(p) for p in sorted(self.folder.rglob("*")) if p.is_file()}


def make_verbs(root: Path, fixture: Path) -> dict[str, Callable[[str], Verb]]:
    """Makers of verbs by name, each for a fresh folder of a given name."""
    dense, rows = tiny_dense(root / "dense"), write_rows(root / "rows.jsonl", 23)
    crafted = root / "crafted"
    assert main(["craft", str(dense), str(crafted), "--num-experts", "4", "--adapter-dim", "8"]) == 0

    def maker(name: str, *arguments: str) -> Callable[[str], Verb]:
        def make(place: str) -> Verb:
            folder = root / place
            folder.mkdir()
            return Verb(name, folder, [*arguments, str(folder / "out")], folder / "out")

        return make

    def make_train(place: str) -> Verb:
        run, recipe = root / place / "run", root / f"{place}.yaml"
        run.parent.mkdir()
        recipe.write_text(
            f"model: {{name: {dense}}}\npesc: {{num_experts: 4, adapter_dim: 8, adapter_dropout: 0.1}}\n"
            f"lora: {{r: 4, dropout: 0.1}}\ndata: {{train: {rows}, max_length: 128, packing: true}}\n"
            f"training: {{steps: {STEPS}, batch_size: 2}}\noutput: {{folder: {run}, save_steps: {SAVE_STEPS}}}\n"
        )
        return Verb("train", run.parent, ["train", str(recipe)], run / "adapter")

    return {
        "import": maker("import", "import", str(fixture)),
        "craft": maker("craft", "craft", str(dense), "--num-experts", "4", "--adapter-dim", "8"),
        "export": maker("export", "export", str(crafted), "--format", "sparsetral"),
        "train": make_train,
    }


def _run(arguments: list[str], folder: Path, disturbance: Disturbance) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)  # `pesc craft` draws the experts
    os.environ["PESC_CACHE"] = str(folder.with_suffix(".cache"))  # so that data are prepared in each folder's first run
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(folder.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    count = _watch(folder, disturbance)
    if disturbance.file_size >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disturbance.file_size, resource.RLIM_INFINITY))
    if disturbance.obey_modes:
        _obey_modes()
    code = main(arguments)
    sys.stdout.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    folder.with_suffix(".count").write_text(str(count[0]))
    sys.exit(code)


def _watch(folder: Path, disturbance: Disturbance) -> list[int]:
    count, below = [0], f"{folder}{os.sep}"

    def on_event(event: str, values: tuple) -> None:
        if event not in EVENTS or not str(values[0]).startswith(below):
            return
        count[0] += 1
        if count[0] == disturbance.at:
            if disturbance.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            shutil.rmtree(folder)

    sys.addaudithook(on_event)
    return count


def _obey_modes() -> None:
    """Give up root's power to write everywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface; this process
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capset(header, sets) == 0


def _digest(path: Path) -> str:
    """Of a file's content; of metrics.jsonl and summary.json, without times and sizes of memory."""
    content = path.read_bytes()
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        content = repr([{k: v for k, v in line.items() if k not in ("elapsed", "tokens_per_second")} for line in lines])
    elif path.name == "summary.json":
        content = repr([json.loads(content)[key] for key in ("steps", "tokens")])
    elif path.name == "recipe.yaml":
        content = "the verb's own"
    elif path.name == "README.md":
        content = "names the day"
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()
