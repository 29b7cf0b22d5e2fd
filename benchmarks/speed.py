"""The tables of docs/results.md on speed and memory: every variant, kind of workload and shape, through `pesc bench`.

Writes one JSON file a run to benchmarks/results/ and leaves those that are there; some 90 minutes on two cores.
Run: python benchmarks/speed.py [--table] [--date 2026-11-24]; with --table it only prints the tables as Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from pesc.bench.config import BenchConfig, Workload
from pesc.bench.measure import Row, run_bench
from pesc.bench.model_pair import BACKENDS, DENSE, UPCYCLED
from pesc.config import PescConfig

RESULTS = Path(__file__).parent / "results"
DTYPES: tuple[Any, ...] = ("bfloat16", "float32")
INFERENCE: list[Workload] = ["prefill", "decode"]
LAYER = "7b-layer"
# Experts, chosen experts and adapter dim, of SmolLM2 but for the one layer.
SHAPES = {
    "a64": (8, 2, 64),
    "a512": (8, 2, 512),
    "e16-a64": (16, 4, 64),
    "e16-a512": (16, 4, 512),
    LAYER: (8, 2, 512),
}


def runs() -> Iterator[tuple[str, BenchConfig]]:
    """(name, what is measured), the most wanted first. What trains runs apart: it needs most memory."""
    for dtype in DTYPES:
        yield f"a64-{dtype}-train", bench_config("a64", dtype, rounds=4)
        yield f"a64-{dtype}", replace(bench_config("a64", dtype, rounds=4), workloads=INFERENCE)
    layer = bench_config(LAYER, "bfloat16", rounds=12)  # short steps, and noisy ones
    yield f"{LAYER}-bfloat16", replace(layer, workloads=["train", "layers", *INFERENCE])
    for dtype in DTYPES:
        more = bench_config("a64", dtype, rounds=2)
        yield f"a64-{dtype}-more", replace(more, workloads=["layers", "decode"], decode_batch=[8, 32])
        yield f"a64-{dtype}-checkpointed", replace(more, workloads=["train_checkpointed"])
    for shape in ("a512", "e16-a64", "e16-a512"):
        for dtype in DTYPES:
            yield from _training(shape, dtype)
            yield f"{shape}-{dtype}", replace(bench_config(shape, dtype, rounds=2), workloads=INFERENCE)
    for dtype in DTYPES:
        upcycling = replace(bench_config("a64", dtype, rounds=2), variants=["auto", UPCYCLED])
        yield f"upcycling-a64-{dtype}-train", upcycling
        yield f"upcycling-a64-{dtype}", replace(upcycling, workloads=INFERENCE)


def _training(shape: str, dtype: str) -> Iterator[tuple[str, BenchConfig]]:
    config = bench_config(shape, dtype, rounds=2)
    if (shape, dtype) == ("e16-a512", "float32"):
        # All variants at once need more than 24 GB, and masks_and_copies does alone.
        yield f"{shape}-{dtype}-train", replace(config, variants=["auto", "sorted_mm", "grouped_mm"])
        yield f"{shape}-{dtype}-large-train", replace(config, variants=["wide_mm", "all_experts"])
    else:
        yield f"{shape}-{dtype}-train", config


def bench_config(shape: str, dtype: Any, rounds: int) -> BenchConfig:
    """A training benchmark of one of SHAPES."""
    experts, chosen, dim = SHAPES[shape]
    pesc_config = PescConfig(num_experts=experts, num_experts_per_tok=chosen, adapter_dim=dim)
    config = BenchConfig(pesc=pesc_config, dtype=dtype, rounds=rounds, workloads=["train"])
    return replace(config, model="llama-2-7b-layer") if shape == LAYER else config


def _title(name: str) -> str:
    """What a run measured, from its name; `upcycling` runs are the only ones with that variant."""
    shape, _, dtype = name.removeprefix("upcycling-").rpartition("-")
    model = "One layer of Llama-2-7B" if shape == LAYER else "SmolLM2"
    experts, chosen, dim = SHAPES[shape]
    short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    more = ", with sparse upcycling" if name.startswith("upcycling") else ""
    return f"{model}, {short}, E {experts}, K {chosen}, A {dim}{more}"


def tables(day: str) -> Iterator[str]:
    """A Markdown table for each shape and dtype: a column for every workload, a row for every variant."""
    merged: dict[str, dict[str, dict[str, Row]]] = {}
    for path in sorted(RESULTS.glob(f"{day}-speed-*.json")):
        name = path.stem.removeprefix(f"{day}-speed-")
        for part in ("-more", "-checkpointed", "-train", "-large"):
            name = name.removesuffix(part)
        results = json.loads(path.read_text())
        for workload, rows in results.get("workloads", results.get("work")).items():  # in older files
            found = merged.setdefault(name, {}).setdefault(workload, {})
            found |= {variant: Row(**row) for variant, row in rows.items()}
    order = (
        "train",
        "train_checkpointed",
        "layers",
        "prefill",
        "decode, batch 1",
        "decode, batch 8",
        "decode, batch 32",
    )
    for name, found in merged.items():
        workloads = {workload: found[workload] for workload in order if workload in found}
        variants = [variant for variant in (DENSE, *BACKENDS, UPCYCLED) if variant in next(iter(workloads.values()))]
        yield f"\n**{_title(name)}**\n\n| variant | {' | '.join(workloads)} | peak GB, train | less own |"
        yield "|---" * (len(workloads) + 3) + "|"
        for variant in variants:
            cells = [_cell(rows[variant]) if variant in rows else "" for rows in workloads.values()]
            memory = _memory(workloads["train"], variant) if "train" in workloads else " | "
            yield f"| {variant} | {' | '.join(cells)} | {memory} |"
        for variant, of in (("auto", ""), (UPCYCLED, f", {UPCYCLED}")):
            if variant in variants:
                bounds = [f"{rows[variant].bound:.2f}" for rows in workloads.values()]
                yield f"| *multiplications{of}* | {' | '.join(bounds)} | | |"
                reads = [rows[variant].bytes_bound for rows in workloads.values()]
                yield f"| *weights read{of}* | {' | '.join('' if r is None else f'{r:.2f}' for r in reads)} | | |"


def _memory(rows: dict[str, Row], variant: str) -> str:
    lean = "" if variant == UPCYCLED else f"{rows[variant].less_own(rows[DENSE]):.3f}"
    return f"{rows[variant].peak_memory / 1e9:.2f} | {lean}"


def _cell(row: Row) -> str:
    if row.ratio == row.ratio_low == row.ratio_high:  # dense itself
        return f"{row.ratio:.2f}"
    return f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"


def main() -> None:
    """Measure what is missing, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--date", default=date.today().isoformat())
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(tables(arguments.date)))
        return
    console = Console()
    for name, config in runs():
        path = RESULTS / f"{arguments.date}-speed-{name}.json"
        if not path.exists():
            partial = path.with_suffix(".part")
            run_bench(config, console, partial)
            partial.rename(path)


if __name__ == "__main__":
    main()
