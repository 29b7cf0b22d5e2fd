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

WIDTH = 960
SMALL = 440
ROLES = ["ink", "muted", "card", "better", "worse", "unclear"]
Spec = dict[str, Any]
"""A chart as Vega-Lite, without the address of its schema and without a theme."""
OUTCOMES = ["better", "worse", "unclear", "unmeasured"]
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"
COLOURS: dict[str, dict[str, Any]] = {
    "light": {
        "card": "#fdfdfc",
        "ink": "#16150f",
        "muted": "#706e67",
        "grid": "#e2e0d9",
        "better": "#17803d",
        "worse": "#c03434",
        "unclear": "#706e67",
        "arms": ["#2a6fc9", "#d9601f", "#7c52b8", "#0b857f", "#b03f78", "#857414"],
        "diverging": ["#b0302c", "#efeeea", "#174f96"],
    },
    "dark": {
        "card": "#1c1c1a",
        "ink": "#f1f0ec",
        "muted": "#a09e95",
        "grid": "#34332f",
        "better": "#46b06a",
        "worse": "#e76a65",
        "unclear": "#a09e95",
        "arms": ["#5598ea", "#e5793d", "#a984e0", "#35b3ab", "#dd74a8", "#bda93c"],
        "diverging": ["#ee7a74", "#33332f", "#79b2f5"],
    },
}


def theme(name: str) -> dict[str, Any]:
    """A Vega-Lite config.

    Args:
        name: light or dark.
    """
    colours = COLOURS[name]
    ink, muted, grid = colours["ink"], colours["muted"], colours["grid"]
    text = {"labelColor": muted, "titleColor": muted, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 400}
    return {
        "background": colours["card"],
        "font": FONT,
        "params": [{"name": role, "value": colours[role]} for role in ROLES]
        + [{"name": "first", "value": colours["arms"][0]}],
        "range": {"category": colours["arms"], "diverging": colours["diverging"]},
        "view": {"stroke": None},
        "axis": {**text, "gridColor": grid, "domain": False, "ticks": False, "labelPadding": 6, "titlePadding": 8},
        "legend": {
            **text,
            "labelColor": ink,
            "orient": "top",
            "symbolType": "stroke",
            "symbolOpacity": 1,
            "symbolStrokeWidth": 3,
            "gradientLength": 160,
        },
        "header": {**text, "labelColor": ink, "labelFontSize": 13, "labelFontWeight": 600},
        "title": {"color": ink, "fontSize": 14, "anchor": "start"},
    }


def picture(spec: Spec, name: str = "light", scale: float = 1.5) -> bytes:
    """A chart as PNG.

    Args:
        spec: the chart.
        name: of the theme.
        scale: pixels for each of the page's.
    """
    return vl_convert.vegalite_to_png(spec, config=theme(name), scale=scale)


@cache
def library() -> str:
    """The JavaScript that draws the charts in a page, without a network."""
    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default


def for_page(spec: Spec) -> Spec:
    """A chart that is as wide as its place in the page, unless it is a row of maps."""
    return spec | {"width": "container"} if "width" in spec else spec


def stacked(specs: Sequence[Spec], title: str) -> Spec:
    """Charts one above the other, as one picture."""
    return {"title": title, "vconcat": list(specs), "spacing": 28, "resolve": {"scale": {"color": "independent"}}}


def forest(comparisons: Sequence[Comparison], edge: float) -> Spec:
    """The difference on each domain with its interval, and of each seed alone where there are several.

    Args:
        comparisons: of one pair of arms.
        edge: the axis goes from -edge to edge.
    """
    first, domains = comparisons[0].first, [case.domain for case in comparisons]
    rows = [_forest_row(case) for case in comparisons]
    seeds = [
        {"domain": case.domain, "mean": finite(mean)}
        for case in comparisons
        for mean in case.estimate.by_seed
        if case.estimate.num_seeds > 1
    ]
    across = alt.Y("domain:N", title=None).scale(domain=domains).axis(labelColor=_role("ink"), labelFontSize=13)
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=across,
        color=alt.Color("outcome:N", legend=None).scale(
            domain=OUTCOMES, range=[_role(role) for role in ("better", "worse", "unclear", "unclear")]
        ),
        tooltip=["domain:N", "difference:N", "interval:N", "outcome:N"],
    )
    second = comparisons[0].second
    title = [f"loss of {first} less that of {second}, nats a token", f"\u2190 {first} better\u2003\u2003worse \u2192"]
    axis = alt.X("mean:Q", title=title).scale(domain=[-edge, edge], nice=False).axis(tickCount=7, format="+.2~f")
    single = alt.Chart(alt.Data(values=seeds)).mark_tick(color=_role("muted"), thickness=2, height=16)
    layers = [
        _rule(x=alt.datum(0)),
        base.mark_rule(strokeWidth=3, strokeCap="round").encode(x=alt.X("low:Q"), x2="high:Q"),
        single.encode(x="mean:Q", y=across),
        base.mark_point(filled=True, size=110, opacity=1).encode(x=axis),
        base.transform_filter("datum.outcome == 'unmeasured'")
        .mark_text(align="left", dx=8)
        .encode(x=alt.datum(0), text=alt.value("not finite")),
    ]
    return spec_of(alt.layer(*layers), width=WIDTH, height=44 * len(domains), description=title[0])


def _forest_row(case: Comparison) -> dict[str, Any]:
    estimate = case.estimate
    low, high = (finite(edge) for edge in (estimate.low, estimate.high))
    return {
        "domain": case.domain,
        "mean": finite(estimate.mean),
        "low": low,
        "high": high,
        "outcome": case.outcome,
        "difference": f"{estimate.mean:+.4f}",
        "interval": f"{estimate.low:+.4f} to {estimate.high:+.4f}",
    }


def curves(rows: Sequence[Mapping[str, Any]], arms: Sequence[str], label: str, even: float | None = None) -> Spec:
    """Curves over training tokens: raw values thin, smoothed ones bold.

    Hovering shows the numbers; a click in the legend leaves one arm.

    Args:
        rows: `arm`, `run`, `tokens`, `raw` and `smooth` each.
        arms: all trained arms, in order, so that an arm has one colour in every chart.
        label: of the vertical axis.
        even: height of a dashed line, in a chart of half the width.
    """
    picked = alt.selection_point(name="picked", fields=["arm"], bind="legend")
    near = alt.selection_point(name="near", nearest=True, on="pointerover", clear="pointerout", empty=False)
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("tokens:Q", title="training tokens").axis(format=",d", tickCount=5, grid=False),
        color=_colour(rows, arms),
        detail="run:N",
    )
    scale = alt.Scale(domain=_span([*(row["raw"] for row in rows), even]), nice=False)
    raw, up = (alt.Y(f"{field}:Q", title=label, scale=scale).axis(tickCount=5) for field in ("raw", "smooth"))
    exact = [alt.Tooltip(f"{field}:Q", title=f"{label}, {field}", format=".4f") for field in ("raw", "smooth")]
    layers = [
        base.mark_line(strokeWidth=1).encode(
            y=raw, opacity=alt.when(picked).then(alt.value(0.3)).otherwise(alt.value(0.05))
        ),
        base.mark_line(strokeWidth=2.5, point=len(rows) < 3).encode(
            y=up, opacity=alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.1))
        ),
        base.mark_point(filled=True, size=70)
        .encode(
            y=up,
            opacity=alt.when(near).then(alt.value(1)).otherwise(alt.value(0)),
            tooltip=["run:N", alt.Tooltip("tokens:Q", format=",d"), *exact],
        )
        .add_params(picked, near),
    ]
    if even is not None:
        layers.append(_rule(y=alt.datum(even)).mark_rule(strokeDash=[4, 3], color=_role("muted")))
    width = WIDTH if even is None else SMALL
    return spec_of(alt.layer(*layers), width=width, height=300 if even is None else 200, description=label)


def load_map(rows: Sequence[Mapping[str, Any]], num_layers: int, limit: float) -> Spec:
    """Expert load by domain, layer and expert, on a log scale: half and double lie equally far from even.

    Args:
        rows: `domain`, `layer`, `expert`, `share` and `load` (1 is even) each.
        num_layers: of the model; layers without experts stay empty.
        limit: the scale goes from 2 ** -limit to 2 ** limit; what lies beyond has the colours of its ends.
    """
    logs = [{**row, "value": max(-limit, min(limit, math.log2(max(row["load"], 1e-9))))} for row in rows]
    colour = alt.Color("value:Q", title="load, 1\u00d7 is even", scale=_diverging(limit)).legend(
        labelExpr="format(pow(2, datum.value), '.2~f') + '\u00d7'", values=[-limit, 0, limit]
    )
    load = [alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("load:Q", title="times even", format=".2f")]
    return _map(logs, num_layers, colour, load, "expert load")


def shift_map(rows: Sequence[Mapping[str, Any]], num_layers: int, limit: float) -> Spec:
    """Share of each expert on a domain less its mean share over the domains.

    Args:
        rows: `domain`, `layer`, `expert`, `share` and `shift` each.
        num_layers: as of `load_map`.
        limit: the scale goes from -limit to limit; what lies beyond has the colours of its ends.
    """
    cut = [{**row, "value": max(-limit, min(limit, row["shift"]))} for row in rows]
    colour = alt.Color("value:Q", title="share less the average domain's", scale=_diverging(limit)).legend(
        format="+.1%", values=[-limit, 0, limit]
    )
    shift = [alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("shift:Q", title="less average", format="+.1%")]
    return _map(cut, num_layers, colour, shift, "shift of expert shares")


def divergence(rows: Sequence[Mapping[str, Any]], arms: Sequence[str], num_layers: int) -> Spec:
    """How much one routed choice tells about the domain, by layer, with a dash at what chance alone would give.

    Args:
        rows: `arm`, `run`, `layer`, `bits` and `noise` each.
        arms: as of `curves`.
        num_layers: of the model.
    """
    layer = alt.X("layer:O", sort=None, axis=_ticks(num_layers)).scale(domain=list(range(num_layers)))
    base = alt.Chart(alt.Data(values=list(rows))).encode(x=layer, xOffset=alt.XOffset("run:N", sort=None))
    bars = base.mark_bar().encode(
        y=alt.Y("bits:Q", title="bits"),
        color=_colour(rows, arms),
        tooltip=["run:N", "layer:O", alt.Tooltip("bits:Q", format=".4f"), alt.Tooltip("noise:Q", format=".4f")],
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


def _map(
    rows: list[dict[str, Any]], num_layers: int, colour: alt.Color, tooltip: list[alt.Tooltip], description: str
) -> Spec:
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    experts = list(range(1 + max(row["expert"] for row in rows)))
    columns = min(len(domains), max(1, WIDTH // (len(experts) * 10 + 60)), 4)
    step = max(8, min(32, (WIDTH // columns - 60) // len(experts)))
    cells = alt.Chart(alt.Data(values=rows)).mark_rect(strokeWidth=1, stroke=_role("card"))
    cells = cells.encode(
        x=alt.X("expert:O", axis=_ticks(len(experts))).scale(domain=experts),
        y=alt.Y("layer:O", axis=_ticks(num_layers)).scale(domain=list(range(num_layers))),
        color=colour,
        tooltip=["domain:N", "layer:O", "expert:O", *tooltip],
    )
    cells = cells.properties(width=alt.Step(step), height=alt.Step(max(6, min(16, 600 // num_layers))))
    facets = cells.facet(facet=alt.Facet("domain:N", sort=domains, title=None), columns=columns)
    return spec_of(facets, description=f"{description}, by domain, layer and expert")


def _colour(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> alt.Color:
    """Of each arm the same in every chart; a legend where a chart shows several."""
    shown = [arm for arm in arms if any(row["arm"] == arm for row in rows)]
    colour = alt.Color("arm:N", title=None).scale(domain=list(arms))
    return colour.legend(values=shown) if len(shown) > 1 else colour.legend(None)


def spec_of(chart: alt.TopLevelMixin, **properties: Any) -> Spec:
    """A chart as a specification, with these of its properties changed."""
    # Unchecked: tests have Vega draw every chart, and checking takes longer than drawing.
    spec = chart.properties(**properties).to_dict(validate=False)
    del spec["$schema"], spec["config"]
    return spec


def _diverging(limit: float) -> alt.Scale:
    return alt.Scale(domain=[-limit, 0, limit], range="diverging", interpolate="lab")


def _ticks(number: int) -> alt.Axis:
    step = 1 if number <= 12 else 5 if number <= 50 else 10
    return alt.Axis(values=list(range(0, number, step)), labelAngle=0)


def _rule(**encoding: Any) -> alt.Chart:
    return alt.Chart(alt.Data(values=[{}])).mark_rule(color=_role("ink")).encode(**encoding)


def _role(name: str) -> alt.ExprRef:
    return alt.ExprRef(name)


def _span(values: Sequence[float | None], least: float = 0.05) -> list[float]:
    """Lowest and highest value, a little apart; a flat curve must not be blown up into a dramatic one."""
    known = [value for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = max(0.03 * (high - low), (least - (high - low)) / 2)
    return [low - margin, high + margin]
