"""Which operations the time of the experts goes to: a profile of a crafted model less that of its dense one.

Run: python benchmarks/operators.py train bfloat16 [--shape a64] [--backend auto] [--products]; two minutes on two
cores. Shapes are those of speed.py; --products tells matrix products of different sizes apart.
"""

from __future__ import annotations

import argparse
import resource
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from speed import SHAPES, bench_config

from pesc.bench.model_pair import BACKENDS, DENSE, build_model_pair, load_base
from pesc.bench.peak import cpu_profiler
from pesc.bench.steps import Step, make_steps
from pesc.machine.allocator import keep_freed_memory

WARM_UPS, STEPS = 8, 7
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


@dataclass
class Profile:
    """A variant's steps by operation, each without what it calls itself."""

    milliseconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, int] = field(default_factory=dict)
    page_faults: list[int] = field(default_factory=list)

    def add(self, step: Step, products: bool) -> None:
        """Profile one step more."""
        faults = _page_faults()
        with cpu_profiler(record_shapes=products) as profiler:
            step.run()
        self.page_faults.append(_page_faults() - faults)
        times: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in profiler.key_averages(group_by_input_shape=products):
            name = f"{event.key} {_sizes(event)}" if products and event.key in PRODUCTS else event.key
            times[name] += event.self_cpu_time_total / 1e3
            calls[name] += event.count
        for name, spent in times.items():
            self.milliseconds[name].append(spent)
        self.calls |= calls

    def medians(self) -> Counter[str]:
        """Milliseconds of a step by operation; steps without it count as 0."""
        steps = len(self.page_faults)
        return Counter({n: median(t + [0.0] * (steps - len(t))) for n, t in self.milliseconds.items()})


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _sizes(event: Any) -> str:
    return " x ".join("x".join(map(str, shape)) for shape in event.input_shapes if len(shape) > 1)


def main() -> None:
    """Profile both models and print the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["train", "layers", "prefill", "decode"])
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--shape", choices=list(SHAPES), default="a64")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--products", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    config = bench_config(arguments.shape, arguments.dtype, rounds=STEPS)
    base = load_base(config.model, getattr(torch, config.dtype))
    pair = build_model_pair(base, config.pesc, lora=arguments.workload == "train", variants=[arguments.backend])
    rows = 1 if arguments.workload == "decode" else config.batch
    steps = make_steps(pair, arguments.workload, rows, config)
    profiles = {variant: Profile() for variant in (DENSE, arguments.backend)}
    for turn in range(WARM_UPS + STEPS):  # in turns, so that both find the heap alike
        for variant, profile in profiles.items():
            if turn < WARM_UPS:
                steps[variant].run()
            else:
                profile.add(steps[variant], arguments.products)
    medians = {variant: profile.medians() for variant, profile in profiles.items()}
    for variant, profile in profiles.items():
        print(f"{variant}: {sum(medians[variant].values()):.0f} ms, {median(profile.page_faults):.0f} page faults")
    dense, crafted = medians[DENSE], medians[arguments.backend]
    total = sum(dense.values())
    calls = profiles[arguments.backend].calls
    print("| operation | calls | added ms | of dense |\n|---|---|---|---|")
    added = Counter({name: crafted[name] - dense[name] for name in crafted})
    for name, milliseconds in added.most_common(14):
        print(f"| {name} | {calls[name]} | {milliseconds:.1f} | {100 * milliseconds / total:.1f} % |")


if __name__ == "__main__":
    main()
