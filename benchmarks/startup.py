"""Waiting times: `pesc --help`, and from the start of `pesc train` to its first step, with experts and without.

Run: python benchmarks/startup.py; some two minutes on two cores.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5
PESC = [sys.executable, "-c", "import sys; from pesc.cli import main; sys.exit(main())"]
ROW = {"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"}]}


def seconds_of(command: list[str]) -> float:
    """How long a command takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def seconds_to_first_step(folder: Path, arm: str) -> float:
    """From the start of the process to the first line of metrics.jsonl."""
    recipe, output = folder / f"{arm}.yaml", folder / arm
    sections = {
        "model": {"name": "smollm2-135m-instruct"},
        "pesc": {"adapter_dim": 64} if arm == "pesc" else None,
        "lora": {"r": 16, "alpha": 32},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "training": {"steps": 1, "batch_size": 1},
        "output": {"folder": str(output)},
    }
    recipe.write_text(json.dumps(sections))  # JSON is YAML
    start = time.perf_counter()
    process = subprocess.Popen([*PESC, "train", str(recipe)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(f"pesc train {recipe} ended with {process.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    process.wait()
    shutil.rmtree(output)
    return seconds


def main() -> None:
    """Measure in turns and print medians."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 4)
        for turn in range(ROUNDS + 1):
            times = {
                "python -c pass": seconds_of([sys.executable, "-c", "pass"]),
                "import pesc": seconds_of([sys.executable, "-c", "import pesc"]),
                "pesc --help": seconds_of([*PESC, "--help"]),
                "import torch, transformers": seconds_of([sys.executable, "-c", "import torch, transformers"]),
                "first step, dense + LoRA": seconds_to_first_step(folder, "dense"),
                "first step, PESC": seconds_to_first_step(folder, "pesc"),
            }
            if turn:
                for label, seconds in times.items():
                    found.setdefault(label, []).append(seconds)
    for label, seconds in found.items():
        low, high = min(seconds), max(seconds)
        print(f"{label:28} {statistics.median(seconds):6.2f} s ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
