"""Charts: real Vega draws every one of them, in both themes, and they hold no colours of their own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import vl_convert

from pesc.report import charts
from pesc.report.charts import Spec
from pesc.report.page import held_out_rows, make_charts
from pesc.report.results import read_metrics
from studies import DOMAINS, make_results, write_study


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Spec]:
    results = make_results(seed_shifts=(0.0, 0.02))
    folder = write_study(tmp_path_factory.mktemp("charts") / "study", results)
    curves = [(arm, run, read_metrics(folder / run.folder)) for arm, run in results.runs() if run.training]
    return dict(make_charts(results, curves, held_out_rows(folder, curves)))


def test_a_study_has_these_charts(drawn: dict[str, Spec]) -> None:
    assert list(drawn) == [
        "verdict-0",
        "loss",
        "load_entropy",
        "aux_loss",
        "held_out",
        "load-0",
        "shift-0",
        "divergence",
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_chart_is_drawn_in_the_themes_colours(drawn: dict[str, Spec], theme: str) -> None:
    known = set(re.findall(r"#[0-9a-f]{6}", json.dumps(charts.theme(theme))))
    for name, chart in drawn.items():
        text = json.dumps(chart)
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b|\bNaN\b", text)
        assert "http" not in text
        svg = vl_convert.vegalite_to_svg(chart, config=charts.theme(theme))
        used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{6})"', svg))
        assert used and used <= known, name


def test_maps_have_a_cell_for_every_domain_layer_and_expert(drawn: dict[str, Spec]) -> None:
    for name in ("load-0", "shift-0"):
        [cells] = list(drawn[name]["data"].values())
        assert {(c["domain"], c["layer"], c["expert"]) for c in cells} == {
            (domain, layer, expert) for domain in DOMAINS for layer in range(4) for expert in range(8)
        }
        svg = vl_convert.vegalite_to_svg(drawn[name], config=charts.theme("light"))
        assert all(f">{domain}</text>" in svg for domain in DOMAINS)


def test_half_and_double_lie_equally_far_from_even() -> None:
    place = {"domain": "a", "layer": 0, "shift": 0.1}
    rows = [{**place, "expert": e, "share": x / 2, "load": x} for e, x in enumerate((0.5, 2.0, 0.0))]
    cells = charts.expert_map(rows, 1, 1.5)["data"]["values"]
    assert [cell["value"] for cell in cells] == [-1.0, 1.0, -1.5]


def test_smoothing_keeps_a_constant_and_passes_over_what_is_not_finite() -> None:
    values = np.array([2.0] * 30 + [math.nan] + [2.0] * 30)
    assert charts.smooth(values) == pytest.approx(2.0)
    assert np.isnan(charts.smooth(np.array([math.nan, 1.0]))).tolist() == [True, False]


def test_a_picture_is_a_png(drawn: dict[str, Spec], tmp_path: Path) -> None:
    assert charts.picture(drawn["verdict-0"]).startswith(b"\x89PNG")
