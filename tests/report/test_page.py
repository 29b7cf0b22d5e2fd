"""The report of a study, from synthetic studies whose outcome we choose."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pesc.report import charts, findings
from pesc.report.page import write_report
from pesc.report.results import ExpertCounts, Results
from studies import DENSE, DOMAINS, PESC, make_counts, make_results, write_study


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The page of a study, without the library that draws its charts; pictures take longer than the rest."""
    monkeypatch.setattr("pesc.report.page._pictures", lambda *_: None)

    def write(results: Results, steps: int = 30, name: str = "study") -> str:
        text = write_report(write_study(tmp_path / name, results, steps)).read_text(encoding="utf-8")
        return text.replace(charts.library(), "")

    return write


def shown(text: str) -> dict[str, Any]:
    """The charts of a page."""
    found = re.search(r"const charts = (.*), themes = ", text)
    assert found
    return json.loads(found[1])


def test_page_and_pictures(tmp_path: Path) -> None:
    results = make_results(seed_shifts=(0.0, 0.01))
    folder = write_study(tmp_path / "study", results)
    text = write_report(folder).read_text(encoding="utf-8")
    assert (folder / "report.html").is_file()
    pictures = {path.stem for path in (folder / "report").iterdir()}
    assert pictures == {*shown(text), "overview"}
    assert f"<h1>{findings.headline(results)}</h1>" in text
    for case in findings.compare(results, results.others[0]):
        assert case.sentence in text


def test_the_page_needs_nothing_from_outside(page: Callable[..., str]) -> None:
    text = page(make_results())
    assert "http" not in text
    assert not re.search(r"<(link|iframe|img)\b|@import|@font-face|\b(src|href)=", text)
    assert "</script" not in charts.library()
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(shown(text)) <= set(ids)


def test_the_same_study_gives_the_same_page(page: Callable[..., str]) -> None:
    assert page(make_results()) == page(make_results(), name="again")


def test_untrusted_text_is_escaped(page: Callable[..., str]) -> None:
    attack = "<script>alert('x')</script></pre>"
    results = make_results({"$chat_{<b>": -0.1, "code": 0.1})
    questions = [replace(results.questions[0], prompt=attack), results.questions[1]]
    text = page(replace(results, questions=questions, machine=attack, notes=[attack]))
    assert text.count("<script") == 2  # the library and ours
    assert text.count("&lt;script&gt;alert") == 3
    assert "$chat_{&lt;b&gt;" in text
    assert "{<b>" not in text


def test_layers_may_differ_and_lack_experts(page: Callable[..., str]) -> None:
    results = make_results({**dict.fromkeys(DOMAINS, -0.1), "law": -0.1}, layers=3)
    rows = {domain: row for domain, (row, *_) in make_counts(results.domains, 1, 8).counts.items()}
    experts = ExpertCounts([2, None, 1], {domain: [row, None, [40, 0, 0, 0]] for domain, row in rows.items()})
    subject = replace(results.subject, runs=[replace(results.subject.runs[0], experts=experts)])
    text = page(replace(results, arms=[*results.arms[:2], subject]))
    assert "Layers without experts, left empty: 1." in text
    assert {cell["layer"] for cell in shown(text)["load-0"]["data"]["values"]} == {0, 2}


def test_one_domain_and_one_step(page: Callable[..., str]) -> None:
    text = page(make_results({"chat": 0.1}, layers=1), steps=1)
    assert "nothing to compare the routing with" in text
    assert not {"shift-0", "divergence"} & set(shown(text))


def test_any_arms(page: Callable[..., str]) -> None:
    results = make_results()
    names = ["start", "LoRA r 74", "one adapter of 512"]
    text = page(replace(results, arms=[replace(a, name=name) for a, name in zip(results.arms, names, strict=True)]))
    assert "beside LoRA r 74, the loss of one adapter of 512" in text
    assert not re.search(rf"{re.escape(DENSE)}|\b{PESC} (is|trains)", text)
    alone = page(replace(results, arms=results.arms[:1]), name="alone")
    assert shown(alone) == {}
    assert "nothing is compared" in alone


def test_every_trained_arm_has_a_verdict(page: Callable[..., str]) -> None:
    results = make_results()
    base, dense, pesc = results.arms
    third = replace(dense, name="LoRA r 74", settings={"lora.r": "74"})
    results = replace(results, arms=[base, dense, third, pesc])
    text = page(results)
    assert [name for name in shown(text) if name.startswith("verdict")] == ["verdict-0", "verdict-1"]
    assert "PESC against LoRA r 74" in text
    assert findings.verdict(findings.compare(results, third)) in text


def test_a_dense_study_shows_no_routing(page: Callable[..., str]) -> None:
    results = make_results()
    text = page(replace(results, arms=results.arms[:2]))
    assert set(shown(text)) == {"loss", "held_out"}
    assert "Where the tokens go" not in text


def test_experts_of_each_arms_first_seed_are_shown(page: Callable[..., str]) -> None:
    text = page(make_results(seed_shifts=(0.0, 0.01, 0.02)))
    assert "PESC, seed 0" in text
    assert len([name for name in shown(text) if name.startswith("load-")]) == 1
    assert {row["run"] for row in shown(text)["divergence"]["data"]["values"]} == {f"PESC, seed {s}" for s in range(3)}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null"])
def test_what_is_not_finite_is_told_not_fatal(tmp_path: Path, page: Callable[..., str], value: str) -> None:
    page(make_results())
    folder = tmp_path / "study"
    for name in (f"{DENSE}-0", "PESC-0"):
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        lines[3] = re.sub(r'("\w+"): [-\d.e]+', rf"\1: {value}", lines[3])
        (folder / name / "metrics.jsonl").write_text("\n".join(lines))
    text = write_report(folder).read_text(encoding="utf-8").replace(charts.library(), "")
    assert "Of the 30 logged losses of PESC, 1 are not finite." in text
    assert not re.search(r"\bNaN\b|\bInfinity\b", text)


def test_a_study_that_diverged_still_gets_its_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", make_results(dict.fromkeys(DOMAINS, math.nan), seed_shifts=(0.0, 0.1)))
    for path in folder.glob("*/metrics.jsonl"):
        path.write_text(
            re.sub(r'("(?:loss|aux_loss|load_entropy|tokens_per_second)"): [-\d.e]+', r"\1: NaN", path.read_text())
        )
    assert "No verdict: a held-out loss is not a finite number" in write_report(folder).read_text(encoding="utf-8")
