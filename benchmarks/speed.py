"""The tables of docs/results.md on speed and memory: every form, kind of work and shape, through `pesc bench`.

Writes one JSON file a run to benchmarks/results/ and leaves those that are there; some 60 minutes on two cores.
Run: python benchmarks/speed.py [--table] [--date 2026-11-24]; with --table it only prints the tables as Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from pesc.bench.config import BenchConfig
from pesc.bench.run import run_bench
from pesc.config import PescConfig

RESULTS = Path(__file__).parent / "results"
SHAPES = {"a64": (8, 2, 64), "a512": (8, 2, 512), "e16-a64": (16, 4, 64), "e16-a512": (16, 4, 512)}


def runs() -> Iterator[tuple[str, BenchConfig]]:
    """(name, what is measured), the most wanted first."""
    for dtype in ("float32", "bfloat16"):
        shared: Any = {"dtype": dtype, "method": _method("a64"), "rounds": 3}
        yield f"a64-{dtype}", BenchConfig(**shared, upcycle=True)
        more: Any = ["train_checkpointed", "layers", "decode"]
        yield f"a64-{dtype}-more", BenchConfig(**shared, work=more, decode_batch=[8, 32])
    yield (
        "7b-layer-bfloat16",
        BenchConfig(
            model="llama-2-7b-layer",
            dtype="bfloat16",
            method=_method("a512"),
            rounds=5,
            work=["train", "layers", "prefill", "decode"],
        ),
    )
    for shape in ("a512", "e16-a64", "e16-a512"):
        for dtype in ("float32", "bfloat16"):
            settings: Any = {"dtype": dtype, "method": _method(shape), "rounds": 3}
            yield f"{shape}-{dtype}", BenchConfig(**settings)


def _method(shape: str) -> PescConfig:
    experts, chosen, dim = SHAPES[shape]
    return PescConfig(num_experts=experts, num_experts_per_tok=chosen, adapter_dim=dim)


def tables(day: str) -> Iterator[str]:
    """A Markdown table for every kind of work of every run that is there."""
    for path in sorted(RESULTS.glob(f"{day}-speed-*.json")):
        result = json.loads(path.read_text())
        for work, rows in result["work"].items():
            yield f"\n{path.stem.removeprefix(f'{day}-speed-')}, {work}\n"
            yield "| form | time | quartiles | arithmetic | weights read | tokens/s | peak GB | less the experts' own |"
            yield "|---|---|---|---|---|---|---|---|"
            for form, row in rows.items():
                lean = (row["peak_memory"] - row["own_memory"]) / rows["dense"]["peak_memory"]
                reads = "" if row["bytes_bound"] is None else f"{row['bytes_bound']:.2f}"
                yield (
                    f"| {form} | {row['ratio']:.2f} | {row['ratio_low']:.2f} to {row['ratio_high']:.2f} "
                    f"| {row['bound']:.2f} | {reads} | {row['tokens_per_second']:.0f} "
                    f"| {row['peak_memory'] / 1e9:.2f} | {lean:.3f} |"
                )


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
