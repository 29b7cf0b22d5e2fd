"""What a training step costs with glibc's allocator as it is, and as `pesc train` sets it.

A process for each, in turns: SmolLM2, dense + LoRA, 2 x 512 tokens, on a CPU.
Run: python benchmarks/freed_memory.py; some four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from pesc.bench.config import BenchConfig
from pesc.bench.model_pair import DENSE, build_model_pair, load_base
from pesc.bench.steps import make_steps
from pesc.machine.allocator import keep_freed_memory

TURNS, WARM_UPS, STEPS = 2, 2, 5
KEEP = "--keep"
SETTINGS: dict[str, list[str]] = {"default": [], "freed memory kept": [KEEP]}


def measure_here(dtype: str, *, keep: bool) -> dict[str, list[float]]:
    """Seconds of every step in this process, and its peak memory in bytes."""
    if keep:
        keep_freed_memory()
    config = BenchConfig(dtype=dtype)  # type: ignore[arg-type]
    pair = build_model_pair(load_base(config.model, getattr(torch, dtype)), config.pesc, lora=True)
    step = make_steps(pair, "train", config.batch, config)[DENSE]
    seconds = []
    for _ in range(WARM_UPS + STEPS):
        start = time.perf_counter()
        step.run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[WARM_UPS:], "peak": [1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]}


def measure_apart(dtype: str, setting: str) -> dict[str, list[float]]:
    """`measure_here` in a new process."""
    command = [sys.executable, __file__, "--here", dtype, *SETTINGS[setting]]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all settings in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", metavar="DTYPE", help="measure in this process and print JSON")
    parser.add_argument(KEEP, action="store_true", help="with --here: keep freed memory")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure_here(arguments.here, keep=arguments.keep)))
        return
    print("| dtype | setting | step, relative to default | range | peak GB of the process |\n|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "peak": []} for name in SETTINGS}
        for _ in range(TURNS):
            for setting, values in found.items():
                for key, more in measure_apart(dtype, setting).items():
                    values[key] += more
        default = statistics.median(found["default"]["seconds"])
        for setting, values in found.items():
            seconds = [value / default for value in values["seconds"]]
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            peak = statistics.median(values["peak"]) / 1e9
            print(f"| {dtype} | {setting} | {statistics.median(seconds):.2f} | {spread} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
