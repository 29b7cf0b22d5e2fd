"""The benchmark: the references compute the same, the arithmetic is right, the report is whole."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from checkpoints import tiny_dense
from pesc import PescConfig
from pesc.bench.config import BenchConfig
from pesc.bench.run import run_bench
from pesc.bench.subjects import BACKENDS, build_subject, multiplications, use_backend
from pesc.bench.timing import Timing, interleave

METHOD = PescConfig(num_experts=4, num_experts_per_tok=2, adapter_dim=8)
IDS = torch.arange(3, 25).view(2, 11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_of_the_crafted_model_computes_the_same(tmp_path: Path, backend: str) -> None:
    subject = build_subject(str(tiny_dense(tmp_path / "dense")), METHOD, torch.float32, lora=False, upcycle=False)
    use_backend(subject.crafted, "eager")
    oracle = subject.crafted(IDS).logits
    assert not torch.allclose(oracle, subject.dense(IDS).logits, atol=1e-3)
    use_backend(subject.crafted, backend)
    assert torch.allclose(subject.crafted(IDS).logits, oracle, atol=1e-5)


def test_multiplications_against_a_count_by_hand(tmp_path: Path) -> None:
    subject = build_subject(str(tiny_dense(tmp_path / "dense")), METHOD, torch.float32, lora=False, upcycle=True)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    dense = 2 * layer + 32 * 264
    experts = 2 * (2 * 2 * 32 * 8 + 4 * 32)
    assert multiplications(subject)["forward"] == pytest.approx((dense + experts) / dense)
    assert subject.upcycled.config.num_local_experts == 4


def test_timings_take_turns_and_give_ratios() -> None:
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert len(timings["a"].seconds) == 2
    assert Timing((2.0, 4.0, 9.0)).ratio(Timing((1.0, 2.0, 3.0)))[0] == 2.0


def test_a_run_writes_every_row_of_every_work(tmp_path: Path) -> None:
    config = BenchConfig(
        model=str(tiny_dense(tmp_path / "dense")),
        method=METHOD,
        work=["train", "train_checkpointed", "prefill", "decode"],
        tokens=8,
        decode_tokens=2,
        rounds=2,
        upcycle=True,
    )
    console = Console(file=io.StringIO(), width=120)
    run_bench(config, console, tmp_path / "out" / "bench.json")
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    for rows in results["work"].values():
        assert set(rows) == {"dense", *BACKENDS, "sparse upcycling"}
        assert rows["dense"]["ratio"] == 1.0
        assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows.values())
    assert "masks_and_copies" in console.file.getvalue()
