"""`pesc bench`: every variant of a model, every workload, in one interleaved run."""

from __future__ import annotations

import gc
import os
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pesc.bench.config import BenchConfig, Workload
from pesc.bench.model_pair import DENSE, UPCYCLED, ModelPair, bound, build_model_pair, load_base, weights_read
from pesc.bench.peak import peak_memory
from pesc.bench.steps import make_steps
from pesc.bench.timing import WARM_UPS, interleave
from pesc.machine.allocator import keep_freed_memory, release_freed_memory
from pesc.machine.description import describe_machine
from pesc.machine.progress import Progress
from pesc.machine.quiet import quiet_libraries
from pesc.storage.files import write_json


@dataclass
class Row:
    """One variant of the model at one workload."""

    tokens_per_second: float
    ratio: float
    """Of its time to the dense variant's, the median of all rounds."""
    ratio_low: float
    """Lower quartile."""
    ratio_high: float
    """Upper quartile."""
    bound: float
    """The ratio if only multiplications cost time."""
    bytes_bound: float | None
    """The ratio if only reading weights cost time; for decoding."""
    peak_memory: int
    """Bytes of tensors."""
    own_memory: int
    """Bytes of the experts' and routers' weights and, in training, gradients and optimizer state."""

    def less_own(self, dense: Row) -> float:
        """Peak memory without the experts' own, relative to the dense variant's."""
        return (self.peak_memory - self.own_memory) / dense.peak_memory


def run_bench(config: BenchConfig, console: Console, output: Path | None = None) -> dict[str, Any]:
    """Time everything asked for, show a table for each workload, and write JSON.

    On a CPU the process keeps freed memory from here on (`keep_freed_memory`), as it does in training.

    Args:
        config: what to time.
        console: for the tables and the progress.
        output: JSON file, written anew after each workload.

    Returns:
        What the JSON holds.

    Raises:
        ValueError, OSError: for a model that cannot be loaded.
    """
    kept = keep_freed_memory()
    # oneDNN keeps 1024 compiled kernels; a variant that needs more would throw out those of its neighbours.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "keeps_freed_memory": kept,
        "config": asdict(config),
        "workloads": {},
    }
    for name, workload, batch in _plan(config):
        with quiet_libraries():
            pair = build_model_pair(
                load_base(config.model, getattr(torch, config.dtype)),
                config.pesc,
                lora=workload.startswith("train"),
                variants=[variant for variant in config.variants if variant != UPCYCLED or workload != "layers"],
            )
            table = _measure(pair, workload, batch, config, console, name)
        results["workloads"][name] = {variant: asdict(row) for variant, row in table.items()}
        _show(name, table, config, console)
        if output is not None:
            write_json(output, results)
        del pair
        gc.collect()
        release_freed_memory()  # in pieces that the next, other shapes would not fit
    return results


def _plan(config: BenchConfig) -> list[tuple[str, Workload, int]]:
    """(name, workload, sequences of a batch) of every table."""
    plan: list[tuple[str, Workload, int]] = []
    for workload in config.workloads:
        if workload == "decode":
            plan += [(f"decode, batch {batch}", workload, batch) for batch in config.decode_batch]
        else:
            plan.append((workload, workload, config.batch))
    return plan


def _measure(
    pair: ModelPair, workload: Workload, batch: int, config: BenchConfig, console: Console, name: str
) -> dict[str, Row]:
    steps = make_steps(pair, workload, batch, config)
    functions = {variant: step.run for variant, step in steps.items()}
    with Progress(console, f"{name}, {config.dtype}", WARM_UPS + config.rounds, transient=True) as progress:
        timings = interleave(functions, config.rounds, progress.update)
    tokens = batch * (config.decode_tokens if workload == "decode" else config.tokens)
    table = {}
    for variant, step in steps.items():
        ratio, low, high = timings[variant].ratio(timings[DENSE])
        table[variant] = Row(
            tokens_per_second=tokens / timings[variant].median,
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
            bound=bound(pair, variant, workload),
            bytes_bound=weights_read(pair, variant, batch) if workload == "decode" else None,
            peak_memory=peak_memory(step.run, step.resident()),
            own_memory=step.own_memory(),
        )
    return table


def _show(name: str, rows: dict[str, Row], config: BenchConfig, console: Console) -> None:
    pesc, dense = config.pesc, rows[DENSE]
    decoding = name.startswith("decode")
    bounds = "bound: multiplications alone" + ("; reads: weights read alone" if decoding else "")
    table = Table(
        title=f"{name}, {config.dtype}, E {pesc.num_experts}, K {pesc.num_experts_per_tok}, A {pesc.adapter_dim}",
        caption=f"Relative to dense{' + LoRA' if name.startswith('train') else ''}. {bounds}; less own: peak memory "
        "without the experts' own.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = ["variant", "time", "quartiles", "bound", *(["reads"] if decoding else []), "tokens/s", "GB", "less own"]
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for variant, row in rows.items():
        table.add_row(
            variant,
            f"{row.ratio:.3f}",
            f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
            f"{row.bound:.3f}",
            *([f"{row.bytes_bound:.3f}"] if row.bytes_bound is not None else []),
            f"{row.tokens_per_second:.0f}",
            f"{row.peak_memory / 1e9:.2f}",
            "" if variant == UPCYCLED else f"{row.less_own(dense):.3f}",
        )
    console.print(table)
