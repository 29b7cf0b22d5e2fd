"""`pesc bench`: every form of a model, every kind of work, in one interleaved run."""

from __future__ import annotations

import gc
import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pesc.bench.config import BenchConfig, Work
from pesc.bench.peak import peak_memory
from pesc.bench.steps import make_steps
from pesc.bench.subjects import DENSE, UPCYCLED, Subject, build_subject, costs, load_base, weights_read
from pesc.bench.timing import WARM_UPS, interleave
from pesc.machine.allocator import keep_freed_memory, release_freed_memory
from pesc.machine.quiet import quiet_libraries


@dataclass
class Row:
    """One form of the model at one kind of work."""

    tokens_per_second: float
    ratio: float
    """Of its time to the dense form's, the median of all rounds."""
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
        """Peak memory without the experts' own, relative to the dense form's."""
        return (self.peak_memory - self.own_memory) / dense.peak_memory


def run_bench(config: BenchConfig, console: Console, output: Path | None = None) -> dict[str, Any]:
    """Time everything asked for, show a table for each kind of work, and write JSON.

    On a CPU the process keeps freed memory from here on (`keep_freed_memory`), as it does in training.

    Args:
        config: what to time.
        console: for the tables and the progress.
        output: JSON file, written anew after each kind of work.

    Returns:
        What the JSON holds.

    Raises:
        ValueError, OSError: for a model that cannot be loaded.
    """
    kept = keep_freed_memory()
    # oneDNN keeps 1024 compiled kernels; a form that needs more would throw out those of its neighbours.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "keeps_freed_memory": kept,
        "config": asdict(config),
        "work": {},
    }
    for name, work, rows in _plan(config):
        with quiet_libraries():
            subject = build_subject(
                load_base(config.model, getattr(torch, config.dtype)),
                config.method,
                lora=work.startswith("train"),
                forms=[form for form in config.forms if form != UPCYCLED or work != "layers"],
            )
            table = _measure(subject, work, rows, config, console, name)
        results["work"][name] = {form: asdict(row) for form, row in table.items()}
        _show(name, table, config, console)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")
        del subject
        gc.collect()
        release_freed_memory()  # in pieces that the next, other shapes would not fit
    return results


def machine() -> str:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {platform.machine()}, {capability}, torch {torch.__version__}"


def _plan(config: BenchConfig) -> list[tuple[str, Work, int]]:
    """(name, kind, rows of a batch) of every table."""
    plan: list[tuple[str, Work, int]] = []
    for work in config.work:
        if work == "decode":
            plan += [(f"decode, batch {rows}", work, rows) for rows in config.decode_batch]
        else:
            plan.append((work, work, config.batch))
    return plan


def _measure(
    subject: Subject, work: Work, rows: int, config: BenchConfig, console: Console, name: str
) -> dict[str, Row]:
    steps = make_steps(subject, work, rows, config)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{name}, {config.dtype}", total=WARM_UPS + config.rounds)
        functions = {form: step.run for form, step in steps.items()}
        timings = interleave(functions, config.rounds, lambda done: progress.update(task, completed=done + 1))
    tokens = rows * (config.decode_tokens if work == "decode" else config.tokens)
    cost = {form: of_form.of(work) for form, of_form in costs(subject, work).items()}
    table = {}
    for form, step in steps.items():
        ratio, low, high = timings[form].ratio(timings[DENSE])
        table[form] = Row(
            tokens_per_second=tokens / timings[form].median,
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
            bound=cost[form] / cost[DENSE],
            bytes_bound=weights_read(subject, form, rows) if work == "decode" else None,
            peak_memory=peak_memory(step.run, step.resident()),
            own_memory=step.own_memory(),
        )
    return table


def _show(name: str, rows: dict[str, Row], config: BenchConfig, console: Console) -> None:
    method, dense = config.method, rows[DENSE]
    decoding = name.startswith("decode")
    bounds = "bound: multiplications alone" + ("; reads: weights read alone" if decoding else "")
    table = Table(
        title=f"{name}, {config.dtype}, E {method.num_experts}, K {method.num_experts_per_tok}, A {method.adapter_dim}",
        caption=f"Relative to dense{' + LoRA' if name.startswith('train') else ''}. {bounds}; less own: peak memory "
        "without the experts' own.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = ["form", "time", "quartiles", "bound", *(["reads"] if decoding else []), "tokens/s", "GB", "less own"]
    for column in columns:
        table.add_column(column, justify="left" if column == "form" else "right", no_wrap=True)
    for form, row in rows.items():
        table.add_row(
            form,
            f"{row.ratio:.3f}",
            f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
            f"{row.bound:.3f}",
            *([f"{row.bytes_bound:.3f}"] if row.bytes_bound is not None else []),
            f"{row.tokens_per_second:.0f}",
            f"{row.peak_memory / 1e9:.2f}",
            "" if form == UPCYCLED else f"{row.less_own(dense):.3f}",
        )
    console.print(table)
