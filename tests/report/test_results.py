"""The schema: what is written is read again, and damage is named with its place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pesc.report.results import Results, parse, read_metrics, read_results, to_json
from studies import DOMAINS, PESC, make_results, write_study


def test_what_is_written_is_read_again() -> None:
    results = make_results(seed_shifts=(0.0, 0.1))
    assert parse(Results, to_json(results).encode(), "results.json") == results


def test_what_is_not_finite_survives() -> None:
    results = make_results()
    base, dense, pesc = results.arms
    nll = [math.nan, math.inf, -math.inf, *dense.runs[0].nll[3:]]
    dense = replace(dense, runs=[replace(dense.runs[0], nll=nll)])
    again = parse(Results, to_json(replace(results, arms=[base, dense, pesc])).encode(), "r")
    np.testing.assert_array_equal(again.arms[1].runs[0].nll, nll)
    null = to_json(again).replace("NaN", "null")
    assert math.isnan(parse(Results, null.encode(), "r").arms[1].runs[0].nll[0])


def test_losses_are_means_over_tokens_and_differences_over_examples() -> None:
    results = make_results({"chat": -0.1, "code": 0.2}, seed_shifts=(0.0, 0.1), num_examples=2)
    base, dense, pesc = results.arms
    assert (results.subject, results.others) == (pesc, [dense, base])
    assert results.losses(base, "chat") == pytest.approx([2.113])
    assert results.losses(dense, "chat") == pytest.approx([1.863, 1.863])
    assert results.differences(dense, "code") == pytest.approx(np.array([[0.21, 0.19], [0.31, 0.29]]))
    assert results.differences(base, "code") == pytest.approx(np.array([[-0.04, -0.06], [0.06, 0.04]]))
    assert results.seeds(pesc, base) == results.seeds(base, pesc) == [0, 1]
    assert results.seeds(pesc, replace(dense, runs=dense.runs[1:])) == [1]
    alone = replace(results, arms=[base])
    assert (alone.subject, alone.others, alone.seeds(base, base)) == (base, [], [None])


def counts(data: Any) -> Any:
    return data["arms"][2]["runs"][0]["experts"]["counts"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda d: d.pop("machine"), "machine is missing"),
        (lambda d: d.update(mashine="x"), "mashine is not a known field"),
        (lambda d: d["arms"][1]["runs"].clear(), r"arms\[1\].runs .*at least 1 item"),
        (lambda d: d["arms"][1].update(name=PESC), "arms must differ in name"),
        (lambda d: d["arms"][1]["runs"][0]["nll"].pop(), r"arms\[1\].runs\[0\].nll has 71 entries and must have 72"),
        (lambda d: d["arms"][1]["runs"][0].update(seed=7), r"arms\[1\].runs must share a seed with those of PESC"),
        (lambda d: d["arms"][1]["runs"][0].update(seed="0"), r"arms\[1\].runs\[0\].seed must be a valid integer"),
        (lambda d: d["examples"][3].update(tokens=0), r"examples\[3\].tokens must be greater than or equal to 1"),
        (lambda d: d["examples"].clear(), r"examples .*at least 1 item"),
        (lambda d: counts(d).pop("math"), r"experts.counts must have the domains chat, code, math"),
        (
            lambda d: counts(d)["math"].pop(),
            r"arms\[2\].runs\[0\].experts: counts.math must have experts in the layers",
        ),
        (lambda d: counts(d)["math"].__setitem__(0, None), "counts.math must have experts in the layers"),
        (lambda d: counts(d)["math"][0].pop(), "counts.math has .7, 8, 8, 8. experts in its layers, another domain"),
        (lambda d: counts(d)["math"][0].__setitem__(1, 0.5), r"experts.counts.math\[0\]\[1\] must be a valid integer"),
    ],
)
def test_damage_is_one_line_with_file_place_and_rule(tmp_path: Path, change: Callable[[Any], None], fault: str) -> None:
    data = json.loads(to_json(make_results()))
    change(data)
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'results.json'))}: .*{fault}") as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_all_faults_come_in_one_error() -> None:
    data = json.loads(to_json(make_results()))
    del data["machine"], data["arms"][1]["runs"][0]["seed"]
    with pytest.raises(ValueError, match=r"arms\[1\].runs\[0\].seed is missing; machine is missing"):
        parse(Results, json.dumps(data).encode(), "results.json")


@pytest.mark.parametrize("name", ["results.json", "PESC-0/metrics.jsonl"])
def test_a_missing_or_broken_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_study(tmp_path / "study", make_results())

    def read() -> None:
        read_metrics(folder / read_results(folder).subject.runs[0].folder)

    for text in ("{not json", "[]", "\xff", '{"loss": "low"}\n'):
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=re.escape(name)):
            read()
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(Path(name).name)):
        read()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null"])
def test_curves_keep_what_is_not_finite(tmp_path: Path, value: str) -> None:
    line = f'{{"step": 1, "loss": {value}, "tokens": 5, "tokens_per_second": 2.0, "grad_norm": 3}}'
    (tmp_path / "metrics.jsonl").write_text(line + "\n\n" + line.replace(value, "1.5") + "\n")
    metrics = read_metrics(tmp_path)
    assert not np.isfinite(metrics["loss"][0])
    assert metrics["loss"][1] == 1.5
    assert np.isnan(metrics["load_entropy"]).all()


def test_the_domains_keep_the_order_of_the_examples() -> None:
    assert make_results().domains == DOMAINS
