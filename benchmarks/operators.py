"""Which operations the time of the experts goes to: a profile of a crafted model less that of its dense one.

Run: python benchmarks/operators.py train bfloat16 [--shape a64] [--backend auto] [--products]; one minute on two cores.
Shapes are those of speed.py; --products tells matrix products of different sizes apart.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from speed import SHAPES, bench_config

from pesc.allocator import keep_freed_memory
from pesc.bench.memory import cpu_profiler
from pesc.bench.steps import Step, make_steps
from pesc.bench.subjects import BACKENDS, DENSE, build_subject, load_base

STEPS = 4
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def operator_times(step: Step, products: bool) -> tuple[Counter[str], Counter[str]]:
    """(milliseconds, calls) of a step by operation, without what it calls itself."""
    for _ in range(3):
        step.run()
    with cpu_profiler(record_shapes=products) as profiler:
        for _ in range(STEPS):
            step.run()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=products):
        name = f"{event.key} {_sizes(event)}" if products and event.key in PRODUCTS else event.key
        times[name] += event.self_cpu_time_total / 1e3 / STEPS
        calls[name] += event.count
    return times, Counter({name: count // STEPS for name, count in calls.items()})


def _sizes(event: Any) -> str:
    return " x ".join("x".join(map(str, shape)) for shape in event.input_shapes if len(shape) > 1)


def main() -> None:
    """Profile both models and print the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train", "layers", "prefill", "decode"])
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", choices=list(SHAPES), default="a64")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--products", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    config = bench_config(arguments.shape, arguments.dtype, rounds=STEPS)
    base = load_base(config.model, getattr(torch, config.dtype))
    subject = build_subject(base, config.method, lora=arguments.work == "train", forms=[arguments.backend])
    rows = 1 if arguments.work == "decode" else config.batch
    steps = make_steps(subject, arguments.work, rows, config)
    dense, _ = operator_times(steps[DENSE], arguments.products)
    crafted, calls = operator_times(steps[arguments.backend], arguments.products)
    total = sum(dense.values())
    print(f"dense {total:.0f} ms, {arguments.backend} {sum(crafted.values()):.0f} ms")
    print("| operation | calls | added ms | of dense |\n|---|---|---|---|")
    added = Counter({name: crafted[name] - dense[name] for name in crafted})
    for name, milliseconds in added.most_common(14):
        print(f"| {name} | {calls[name]} | {milliseconds:.1f} | {100 * milliseconds / total:.1f} % |")


if __name__ == "__main__":
    main()
