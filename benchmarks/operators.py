"""Which operations the time of the experts goes to: a profile of a crafted model less that of its dense one.

Run: python benchmarks/operators.py train bfloat16 [--backend auto]; SmolLM2, E 8, K 2, A 64, one minute on two cores.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from pesc.allocator import keep_freed_memory
from pesc.bench.config import BenchConfig
from pesc.bench.memory import cpu_profiler
from pesc.bench.steps import Step, make_steps
from pesc.bench.subjects import BACKENDS, DENSE, build_subject, load_base

STEPS = 4


def operator_times(step: Step) -> tuple[Counter[str], Counter[str]]:
    """(milliseconds, calls) of a step by operation, without what it calls itself."""
    for _ in range(3):
        step.run()
    with cpu_profiler() as profiler:
        for _ in range(STEPS):
            step.run()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[event.key] = event.self_cpu_time_total / 1e3 / STEPS
        calls[event.key] = event.count // STEPS
    return times, calls


def main() -> None:
    """Profile both models and print the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train", "layers", "prefill", "decode"])
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()
    config = BenchConfig(dtype=arguments.dtype)
    base = load_base(config.model, getattr(torch, config.dtype))
    subject = build_subject(base, config.method, lora=arguments.work == "train", upcycle=False)
    rows = 1 if arguments.work == "decode" else config.batch
    steps = make_steps(subject, arguments.work, rows, config)
    dense, _ = operator_times(steps[DENSE])
    crafted, calls = operator_times(steps[arguments.backend])
    total = sum(dense.values())
    print(f"dense {total:.0f} ms, {arguments.backend} {sum(crafted.values()):.0f} ms")
    print("| operation | calls | added ms | of dense |\n|---|---|---|---|")
    added = Counter({name: crafted[name] - dense[name] for name in crafted})
    for name, milliseconds in added.most_common(14):
        print(f"| {name} | {calls[name]} | {milliseconds:.1f} | {100 * milliseconds / total:.1f} % |")


if __name__ == "__main__":
    main()
