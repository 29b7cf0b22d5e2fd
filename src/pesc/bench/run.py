"""`pesc bench`: every form of a model, every kind of work, in one interleaved run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pesc.bench.config import BenchConfig, Work
from pesc.bench.subjects import DENSE, Subject, build_subject, multiplications, use_backend
from pesc.bench.timing import Timing, interleave
from pesc.quiet import quiet_libraries


def run_bench(config: BenchConfig, console: Console, output: Path | None = None) -> dict[str, Any]:
    """Time everything asked for, show a table for each kind of work, and write JSON.

    Args:
        config: what to time.
        console: for the tables.
        output: JSON file to write.

    Returns:
        What the JSON holds.
    """
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": config.model,
        "method": config.method.to_dict(),
        "dtype": config.dtype,
        "rounds": config.rounds,
        "work": {},
    }
    for work in config.work:
        with quiet_libraries():
            subject = build_subject(
                config.model,
                config.method,
                getattr(torch, config.dtype),
                lora=work.startswith("train"),
                upcycle=config.upcycle,
            )
            timings = interleave(_functions(subject, work, config), config.rounds)
        bound = multiplications(subject)["train" if work.startswith("train") else "forward"]
        rows = _rows(timings, bound, _tokens(work, config))
        results["work"][work] = rows
        _show(work, rows, config, console)
        del subject
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    return results


def machine() -> str:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {platform.machine()}, {capability}, torch {torch.__version__}"


def _functions(subject: Subject, work: Work, config: BenchConfig) -> dict[str, Callable[[], object]]:
    device = subject.dense.device
    torch.manual_seed(0)
    ids = torch.randint(3, subject.dense.config.vocab_size, (config.batch, config.tokens), device=device)
    prompt = ids.repeat(config.decode_batch, 1)[: config.decode_batch, :16]
    made: dict[str, Callable[[], object]] = {}
    for name, (model, backend) in subject.forms().items():
        if work.startswith("train"):
            made[name] = _train_step(model, backend, ids, work == "train_checkpointed")
        elif work == "prefill":
            made[name] = _prefill(model, backend, ids)
        else:
            made[name] = _decode(model, backend, prompt, config.decode_tokens)
    return made


def _train_step(model: Any, backend: str | None, ids: torch.Tensor, checkpointed: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable()

    def step() -> None:
        use_backend(model, backend)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _prefill(model: Any, backend: str | None, ids: torch.Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def prefill() -> object:
        use_backend(model, backend)
        return model(ids, logits_to_keep=1)

    return prefill


def _decode(model: Any, backend: str | None, prompt: torch.Tensor, tokens: int) -> Callable[[], object]:
    model.generation_config.eos_token_id = None

    def decode() -> object:
        use_backend(model, backend)
        mask = torch.ones_like(prompt)
        return model.generate(
            prompt, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    return decode


def _rows(timings: dict[str, Timing], bound: float, tokens: int) -> dict[str, dict[str, float]]:
    rows = {}
    for name, timing in timings.items():
        ratio, low, high = timing.ratio(timings[DENSE])
        rows[name] = {
            "tokens_per_second": tokens / timing.median,
            "ratio": ratio,
            "ratio_low": low,
            "ratio_high": high,
            "bound": 1.0 if name == DENSE else bound,
        }
    return rows


def _tokens(work: Work, config: BenchConfig) -> int:
    return config.decode_batch * config.decode_tokens if work == "decode" else config.batch * config.tokens


def _show(work: Work, rows: dict[str, dict[str, float]], config: BenchConfig, console: Console) -> None:
    method = config.method
    title = (
        f"{work}, {config.dtype}, E {method.num_experts}, K {method.num_experts_per_tok}, A {method.adapter_dim}: time "
        f"relative to dense{' + LoRA' if work.startswith('train') else ''}"
    )
    table = Table(title=title)
    for column in ("form", "ratio", "quartiles", "arithmetic bound", "tokens/s"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['ratio']:.3f}",
            f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
            f"{row['bound']:.3f}",
            f"{row['tokens_per_second']:.0f}",
        )
    console.print(table)
