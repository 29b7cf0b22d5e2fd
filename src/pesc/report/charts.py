"""The report's charts: one Vega-Lite specification each, drawn as a picture or in the page, in light and in dark.

Charts hold no colours. A theme is a Vega-Lite config whose parameters give the roles (`ink`, `better`, …) their values,
so that the page can draw its charts again when the reader's system turns dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import altair as alt
import numpy as np
import vl_convert

from pesc.report.findings import Comparison

WIDTH, SMALL = 960, 440
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"
COLOURS = {
    "light": {
        "card": "#fdfdfc",
        "ink": "#16150f",
        "muted": "#706e67",
        "grid": "#e2e0d9",
        "better": "#17803d",
        "worse": "#c03434",
        "unclear": "#706e67",
    },
    "dark": {
        "card": "#1c1c1a",
        "ink": "#f1f0ec",
        "muted": "#a09e95",
        "grid": "#34332f",
        "better": "#46b06a",
        "worse": "#e76a65",
        "unclear": "#a09e95",
    },
}
ARMS = {
    "light": ["#2a6fc9", "#d9601f", "#7c52b8", "#0b857f", "#b03f78", "#857414"],
    "dark": ["#5598ea", "#e5793d", "#a984e0", "#35b3ab", "#dd74a8", "#bda93c"],
}
DIVERGING = {"light": ["#b0302c", "#efeeea", "#174f96"], "dark": ["#ee7a74", "#33332f", "#79b2f5"]}
Spec = dict[str, Any]
"""A chart as Vega-Lite, without the address of its schema and without a theme."""
Rows = Sequence[Mapping[str, Any]]


def theme(name: str) -> dict[str, Any]:
    """A Vega-Lite config: light or dark."""
    colours = COLOURS[name]
    text = dict.fromkeys(("labelColor", "titleColor"), colours["muted"]) | {"labelFontSize": 12, "titleFontSize": 12}
    symbols = {
        "symbolType": "stroke",
        "symbolOpacity": 1,
        "symbolStrokeWidth": 3,
        "gradientLength": 160,
        "labelLimit": 300,
    }
    return {
        "background": colours["card"],
        "font": FONT,
        "params": [{"name": role, "value": value} for role, value in {**colours, "first": ARMS[name][0]}.items()],
        "range": {"category": ARMS[name], "diverging": DIVERGING[name]},
        "view": {"stroke": None},
        "axis": {**text, "titleFontWeight": 400, "gridColor": colours["grid"], "domain": False, "ticks": False}
        | {"labelPadding": 6, "titlePadding": 8},
        "legend": {**text, "titleFontWeight": 400, "labelColor": colours["ink"], "orient": "top", **symbols},
        "header": {**text, "labelColor": colours["ink"], "labelFontSize": 13, "labelFontWeight": 600},
        "title": {"color": colours["ink"], "fontSize": 14, "anchor": "start"},
    }


def spec_of(chart: alt.TopLevelMixin, **properties: Any) -> Spec:
    """A chart as a specification, with these of its properties changed."""
    # Unchecked: tests have Vega draw every chart, and checking takes longer than drawing.
    spec = chart.properties(**properties).to_dict(validate=False)
    del spec["$schema"], spec["config"]
    return spec


def picture(spec: Spec, scale: float = 1.5) -> bytes:
    """A chart as PNG, in light, with `scale` pixels for each of the page's."""
    return vl_convert.vegalite_to_png(spec, config=theme("light"), scale=scale)


@cache
def library() -> str:
    """The JavaScript that draws the charts in a page, without a network."""
    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default


def stacked(specs: Sequence[Spec], title: str) -> Spec:
    """Charts one above the other, as one picture."""
    return {"title": title, "vconcat": list(specs), "spacing": 28, "resolve": {"scale": {"color": "independent"}}}


def forest(comparisons: Sequence[Comparison], edge: float) -> Spec:
    """The difference on each domain with its interval, and of each seed alone if there are several.

    Args:
        comparisons: of one pair of arms.
        edge: the axis goes from -edge to edge.
    """
    rows: list[dict[str, Any]] = []
    seeds: list[dict[str, Any]] = []
    for case in comparisons:
        found = case.estimate
        place: dict[str, Any] = {"domain": case.domain, "outcome": found.outcome}
        numbers = {"mean": finite(found.mean), "low": finite(found.low), "high": finite(found.high)}
        words = {"difference": f"{found.mean:+.4f}", "interval": f"{found.low:+.4f} to {found.high:+.4f}"}
        rows.append(place | numbers | words)
        seeds += [{"domain": case.domain, "mean": finite(mean)} for mean in found.by_seed if found.num_seeds > 1]
    first, second = comparisons[0].first, comparisons[0].second
    title = [f"loss of {first} less {second}", f"\u2190 {first} better\u2003nats a token\u2003worse \u2192"]
    domains = [case.domain for case in comparisons]
    up = alt.Y("domain:N", title=None).scale(domain=domains).axis(labelColor=_role("ink"), labelFontSize=13)
    across = alt.X("mean:Q", title=title).scale(domain=[-edge, edge], nice=False).axis(tickCount=7, format="+.2~f")
    outcomes = {"better": "better", "worse": "worse", "unclear": "unclear", "unmeasured": "unclear"}
    colour = alt.Color("outcome:N", legend=None).scale(
        domain=list(outcomes), range=[_role(role) for role in outcomes.values()]
    )
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=up, color=colour, tooltip=["domain:N", "difference:N", "interval:N", "outcome:N"]
    )
    ticks = alt.Chart(alt.Data(values=seeds)).mark_tick(color=_role("muted"), thickness=2, height=16)
    unmeasured = base.transform_filter("datum.outcome == 'unmeasured'").mark_text(align="left", dx=8)
    layers = alt.layer(
        _rule().encode(x=alt.datum(0)),
        base.mark_rule(strokeWidth=3, strokeCap="round").encode(x="low:Q", x2="high:Q"),
        ticks.encode(x="mean:Q", y=up),
        base.mark_point(filled=True, size=110, opacity=1).encode(x=across),
        unmeasured.encode(x=alt.datum(0), text=alt.value("not finite")),
    )
    return spec_of(layers, width=WIDTH, height=44 * len(domains), description=title[0])


def curves(rows: Rows, arms: Sequence[str], label: str, even: float | None = None) -> Spec:
    """Curves over training tokens: raw values thin, smoothed ones bold.

    Hovering shows the numbers; a click in the legend leaves one arm.

    Args:
        rows: `arm`, `run`, `tokens`, `raw` and `smooth` each.
        arms: all trained arms, in order, so that an arm has one colour in every chart.
        label: of the vertical axis.
        even: height of a dashed line, in a chart of half the width.
    """
    picked = alt.selection_point(name="picked", fields=["arm"], bind="legend")
    near = alt.selection_point(name="near", on="pointerover", clear="pointerout", empty=False)
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("tokens:Q", title="training tokens").axis(format=",d", tickCount=5, grid=False),
        color=_colour(rows, arms),
        detail="run:N",
    )
    scale = alt.Scale(domain=_span([*(row["raw"] for row in rows), even]), nice=False)
    raw, up = (alt.Y(f"{field}:Q", title=label, scale=scale).axis(tickCount=5) for field in ("raw", "smooth"))
    exact = [alt.Tooltip(f"{field}:Q", title=f"{label}, {field}", format=".4f") for field in ("raw", "smooth")]
    tooltip = ["run:N", alt.Tooltip("tokens:Q", format=",d"), *exact]
    layers = [
        base.mark_line(strokeWidth=1).encode(y=raw, opacity=_opacity(picked, 0.3, 0.05)),
        base.mark_line(strokeWidth=2.5, point=len(rows) < 3).encode(y=up, opacity=_opacity(picked, 1, 0.1)),
        base.mark_point(filled=True, size=70).encode(y=up, opacity=_opacity(near, 1, 0)),
        # Not `nearest`: Vega-Lite (6.4) then finds no text fields for the tooltip.
        base.mark_point(filled=True, size=300, opacity=0).encode(y=up, tooltip=tooltip).add_params(picked, near),
    ]
    if even is not None:
        layers.append(_rule(strokeDash=[4, 3]).encode(y=alt.datum(even)))
    width, height = (WIDTH, 300) if even is None else (SMALL, 200)
    return spec_of(alt.layer(*layers), width=width, height=height, description=label)


def expert_map(rows: Rows, num_layers: int, limit: float, *, shift: bool = False) -> Spec:
    """Each expert by domain and layer: its load on a log scale, so that half and double lie equally far from even.

    Args:
        rows: `domain`, `layer`, `expert`, `share`, `load` (1 is even) and `shift` (share less the average domain's).
        num_layers: of the model; layers without experts stay empty.
        limit: the scale goes from 2 ** -limit to 2 ** limit; what lies beyond has the colours of its ends.
        shift: colour by `shift`, from -limit to limit.
    """
    values = [row["shift"] if shift else math.log2(max(row["load"], 1e-9)) for row in rows]
    cells = [{**row, "value": max(-limit, min(limit, value))} for row, value in zip(rows, values, strict=True)]
    domains, num_experts = list(dict.fromkeys(r["domain"] for r in rows)), 1 + max(r["expert"] for r in rows)
    columns = min(len(domains), max(1, WIDTH // (num_experts * 10 + 60)), 4)
    step = max(8, min(32, (WIDTH // columns - 60) // num_experts))
    title = "share less the average domain's" if shift else "load, 1\u00d7 is even"
    legend = alt.Legend(values=[-limit, 0, limit], format="+.1%")
    if not shift:
        legend.labelExpr = "format(pow(2, datum.value), '.2~f') + '\u00d7'"
    chart = alt.Chart(alt.Data(values=cells)).mark_rect(strokeWidth=1, stroke=_role("card"))
    chart = chart.encode(
        x=alt.X("expert:O", axis=_ticks(num_experts)).scale(domain=list(range(num_experts))),
        y=alt.Y("layer:O", axis=_ticks(num_layers)).scale(domain=list(range(num_layers))),
        color=alt.Color("value:Q", title=title)
        .scale(domain=[-limit, 0, limit], range="diverging", interpolate="lab")
        .legend(legend),
        tooltip=["domain:N", "layer:O", "expert:O"]
        + [alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("load:Q", title="times even", format=".2f")]
        + [alt.Tooltip("shift:Q", title="less the average domain", format="+.1%")],
    )
    chart = chart.properties(width=alt.Step(step), height=alt.Step(max(6, min(16, 600 // num_layers))))
    facets = chart.facet(facet=alt.Facet("domain:N", sort=domains, title=None), columns=columns)
    return spec_of(facets, description=f"{title}, by domain, layer and expert")


def divergence(rows: Rows, arms: Sequence[str], num_layers: int) -> Spec:
    """How much one routed choice tells about the domain, by layer, with a dash at what chance alone would give.

    Args:
        rows: `arm`, `run`, `layer`, `bits` and `noise` each.
        arms: as of `curves`.
        num_layers: of the model.
    """
    layer = alt.X("layer:O", sort=None, axis=_ticks(num_layers)).scale(domain=list(range(num_layers)))
    base = alt.Chart(alt.Data(values=list(rows))).encode(x=layer, xOffset=alt.XOffset("run:N", sort=None))
    exact = [alt.Tooltip(f"{field}:Q", format=".4f") for field in ("bits", "noise")]
    bars = base.mark_bar().encode(
        y=alt.Y("bits:Q", title="bits"), color=_colour(rows, arms), tooltip=["run:N", "layer:O", *exact]
    )
    noise = base.mark_tick(color=_role("ink"), thickness=1.5, orient="horizontal").encode(y="noise:Q")
    return spec_of(alt.layer(bars, noise), width=WIDTH, height=190, description="divergence between domains")


def smooth(values: np.ndarray) -> np.ndarray:
    """Bias-corrected exponential mean over about a twentieth of the curve; passes over what is not finite."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total, weight = 0.0, 0.0
    out = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        if weight:
            out[index] = total / weight
    return out


def finite(value: float, digits: int = 6) -> float | None:
    """A number that JSON can hold, short; None for what is not finite, which a chart leaves out."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _colour(rows: Rows, arms: Sequence[str]) -> alt.Color:
    """Of each arm the same in every chart; a legend if a chart shows several."""
    shown = [arm for arm in arms if any(row["arm"] == arm for row in rows)]
    colour = alt.Color("arm:N", title=None).scale(domain=list(arms))
    return colour.legend(values=shown) if len(shown) > 1 else colour.legend(None)


def _opacity(when: alt.Parameter, chosen: float, other: float) -> Any:
    return alt.when(when).then(alt.value(chosen)).otherwise(alt.value(other))


def _ticks(number: int) -> alt.Axis:
    step = 1 if number <= 12 else 5 if number <= 50 else 10
    return alt.Axis(values=list(range(0, number, step)), labelAngle=0)


def _rule(**mark: Any) -> alt.Chart:
    return alt.Chart(alt.Data(values=[{}])).mark_rule(color=_role("muted"), **mark)


def _role(name: str) -> alt.ExprRef:
    return alt.ExprRef(name)


def _span(values: Sequence[float | None], least: float = 0.05) -> list[float]:
    """Lowest and highest value, a little apart; a flat curve must not be blown up into a dramatic one."""
    known = [value for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = max(0.03 * (high - low), (least - (high - low)) / 2)
    return [low - margin, high + margin]
