"""The benchmark: the references compute the same, the arithmetic is right, the report is complete."""

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
from pesc.bench.measure import run_bench
from pesc.bench.model_pair import BACKENDS, build_model_pair, costs, load_base, use_backend, weights_read
from pesc.bench.peak import peak_memory
from pesc.bench.steps import make_steps
from pesc.bench.timing import WARM_UPS, Timing, interleave
from pesc.crafting.cost import Multiplications
from pesc.crafting.surgery import expert_parameters

PESC = PescConfig(num_experts=4, num_experts_per_tok=2, adapter_dim=8)
IDS = torch.arange(3, 25).view(2, 11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_variant_of_the_crafted_model_computes_the_same(tmp_path: Path, backend: str) -> None:
    pair = build_model_pair(load_base(str(tiny_dense(tmp_path / "dense")), torch.float32), PESC, lora=False)
    use_backend(pair.crafted, "eager")
    oracle = pair.crafted(IDS).logits
    assert not torch.allclose(oracle, pair.dense(IDS).logits, atol=1e-3)
    use_backend(pair.crafted, backend)
    assert torch.allclose(pair.crafted(IDS).logits, oracle, atol=1e-5)


def test_costs_against_a_count_by_hand(tmp_path: Path) -> None:
    pair = build_model_pair(
        load_base(str(tiny_dense(tmp_path / "dense")), torch.float32),
        PESC,
        lora=False,
        variants=["auto", "sparse_upcycling"],
    )
    ffn, attention, router, expert = 3 * 32 * 48, 32 * 32 * 2 + 32 * 16 * 2, 4 * 32, 2 * 32 * 8
    dense = 2 * (ffn + attention) + 32 * 264
    found = costs(pair, "prefill")
    assert found["dense"] == Multiplications(dense, 0)
    assert found["auto"] == Multiplications(dense, 2 * (2 * expert + router))
    assert found["sparse_upcycling"] == Multiplications(dense - 2 * ffn, 2 * (2 * ffn + router))
    assert costs(pair, "layers")["auto"] == Multiplications(2 * ffn, 2 * (2 * expert + router))
    assert pair.upcycled.config.num_local_experts == 4
    assert weights_read(pair, "auto", 1) == pytest.approx(1 + 2 * (2 * expert + router) / dense)
    assert weights_read(pair, "auto", 1000) == pytest.approx(1 + 2 * (4 * expert + router) / dense)
    assert weights_read(pair, "sparse_upcycling", 1000) == pytest.approx((dense + 3 * 2 * ffn) / dense)


def test_a_backward_pass_costs_a_product_for_the_input_and_one_for_each_trained_weight() -> None:
    cost = Multiplications(frozen=10, trained=1)
    assert [cost.forward, cost.step(), cost.step(checkpointed=True)] == [11, 23, 34]


def test_peak_memory_is_what_lies_there_and_what_a_step_adds() -> None:
    weight = torch.ones(1000)

    def step() -> None:
        doubled = weight * 2
        del doubled
        tripled = weight.repeat(3)
        del tripled

    assert peak_memory(step, [weight, weight.view(10, 100)]) == pytest.approx(4 * 4000, rel=0.1)


def test_timings_take_turns_and_give_ratios() -> None:
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b", "b", "a"] * ((WARM_UPS + 2) // 2)
    assert len(timings["a"].seconds) == 2
    assert Timing((2.0, 4.0, 9.0)).ratio(Timing((1.0, 2.0, 3.0)))[0] == 2.0


def test_a_run_writes_every_row_of_every_workload(tmp_path: Path) -> None:
    config = BenchConfig(
        model=str(tiny_dense(tmp_path / "dense")),
        pesc=PESC,
        workloads=["train", "train_checkpointed", "layers", "prefill", "decode"],
        tokens=8,
        decode_batch=[1, 3],
        decode_tokens=2,
        rounds=2,
        variants=[*BACKENDS, "sparse_upcycling"],
    )
    console = Console(file=io.StringIO(), width=160)
    run_bench(config, console, tmp_path / "out" / "bench.json")
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert list(results["workloads"]) == [*config.workloads[:4], "decode, batch 1", "decode, batch 3"]
    for name, rows in results["workloads"].items():
        assert set(rows) == {"dense", *BACKENDS} | (set() if name == "layers" else {"sparse_upcycling"})
        assert rows["dense"]["ratio"] == rows["dense"]["bound"] == 1.0
        assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows.values())
        assert all(row["bound"] > 1 and row["own_memory"] > 0 for variant, row in rows.items() if variant in BACKENDS)
        assert rows["sorted_mm"]["peak_memory"] > rows["dense"]["peak_memory"] > rows["dense"]["own_memory"] == 0
    assert "masks_and_copies" in console.file.getvalue()
    assert f"prefill, float32  {WARM_UPS + 2}/{WARM_UPS + 2}" in console.file.getvalue()


def test_trained_experts_hold_weights_gradients_and_two_moments(tmp_path: Path) -> None:
    pair = build_model_pair(load_base(str(tiny_dense(tmp_path / "dense")), torch.float32), PESC, lora=True)
    step = make_steps(pair, "train", 2, BenchConfig(tokens=4))["auto"]
    step.run()
    assert step.own_memory() == 4 * 4 * sum(p.numel() for p in expert_parameters(pair.crafted).values())


def test_no_number_below_one() -> None:
    with pytest.raises(ValueError, match=r"decode_batch \(\[1, 0\]\) must be .* integers of at least 1"):
        BenchConfig(decode_batch=[1, 0])


def test_only_the_variants_asked_for_are_timed(tmp_path: Path) -> None:
    model = str(tiny_dense(tmp_path / "dense"))
    config = BenchConfig(model=model, pesc=PESC, workloads=["prefill"], tokens=4, rounds=1, variants=["wide_mm"])
    assert set(run_bench(config, Console(quiet=True))["workloads"]["prefill"]) == {"dense", "wide_mm"}
    with pytest.raises(ValueError, match=r"variants \(\[\]\) must be a non-empty list of values among auto, "):
        BenchConfig(variants=[])


def test_upcycling_refuses_what_mixtral_cannot_hold(tmp_path: Path) -> None:
    base = load_base(str(tiny_dense(tmp_path / "dense")), torch.float32)
    pesc_config = PescConfig(num_experts=[4, 2], num_experts_per_tok=2, adapter_dim=8)
    with pytest.raises(ValueError, match=r"num_experts \[4, 2\]: leave it out"):
        build_model_pair(base, pesc_config, lora=False, variants=["sparse_upcycling"])
