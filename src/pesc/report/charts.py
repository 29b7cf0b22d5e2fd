"""The report's charts: matplotlib figures written as SVG whose colours are CSS variables.

A figure is drawn in stand-in colours, one per role, and the finished SVG has each replaced by
`var(--role)`. So the page alone decides what a role looks like, in light and in dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedLocator, MaxNLocator

from pesc.report.findings import Comparison

HALF = 10  # colour steps on each side of a heat map's centre
ROLES = ["ink", "muted", "grid", "dense", "pesc", "better", "worse", "unclear"]


ROLES += [f"heat{step}" for step in range(2 * HALF + 1)]


STYLE: Any = {  # matplotlib types the keys as literals
    "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's font
    "svg.hashsalt": "pesc",  # the same run gives the same page
    "text.parse_math": False,  # a domain's name may hold a dollar sign
    "font.size": 9,
}


def colour(role: str) -> str:
    """The stand-in colour of a role."""
    return f"#00{ROLES.index(role):02x}fe"


def loss_chart(curves: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> Markup:
    """Training loss over tokens; each curve is (name, role, tokens, loss), raw thin and smoothed bold."""
    with rc_context(STYLE):
        figure, axes = _blank(9.6, 3.6, "training tokens", "loss")
        for name, role, tokens, loss in curves:
            axes.plot(tokens, loss, color=colour(role), linewidth=0.8, alpha=0.35)
            axes.plot(
                tokens,
                smooth(loss),
                color=colour(role),
                linewidth=2,
                label=name,
                marker="o" if len(loss) < 2 else None,
            )
        _plain_tokens(axes)
        axes.legend(
            frameon=False,
            labelcolor=colour("ink"),
            loc="lower right",
            ncols=len(curves),
            bbox_to_anchor=(1, 1),
            borderaxespad=0,
        )
        return _svg(figure, "loss")


def line_chart(name: str, label: str, tokens: np.ndarray, values: np.ndarray, even: float) -> Markup:
    """One curve of the router over tokens, with a dashed line where perfectly even use would be."""
    with rc_context(STYLE):
        figure, axes = _blank(4.7, 2.6, "training tokens", label)
        axes.axhline(even, color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(tokens, values, color=colour("pesc"), linewidth=1.6, marker="o" if len(values) < 2 else None)
        _plain_tokens(axes)
        low, high = axes.get_ylim()
        if high - low < 0.05:  # a flat curve must not be blown up into a dramatic one
            axes.set_ylim((low + high) / 2 - 0.025, (low + high) / 2 + 0.025)
        return _svg(figure, name)


def forest_chart(comparisons: Sequence[Comparison], clear: float) -> Markup:
    """Paired loss difference per domain with its interval; left of zero is better for PESC."""
    with rc_context(STYLE):
        height = 0.8 + 0.42 * len(comparisons)
        figure, axes = _blank(9.6, height, "loss of PESC \u2212 loss of dense + LoRA", "")
        axes.axvline(0, color=colour("ink"), linewidth=1)
        spots = range(len(comparisons))
        for spot, case in zip(spots, comparisons, strict=True):
            if not np.isfinite(case.mean):
                axes.text(0, spot, "  not finite", color=colour("muted"), va="center")
                continue
            reach = clear * case.error if np.isfinite(case.error) else 0.0
            role = colour(case.outcome)
            axes.plot(
                [case.mean - reach, case.mean + reach],
                [spot, spot],
                color=role,
                linewidth=2,
                solid_capstyle="round",
            )
            axes.plot([case.mean], [spot], "o", color=role, markersize=7)
        edge = max([abs(edge) for edge in axes.get_xlim()] + [1e-3])
        axes.set_xlim(-edge, edge)
        axes.set_ylim(len(comparisons) - 0.5, -0.8)
        axes.set_yticks(list(spots), [case.domain for case in comparisons], color=colour("ink"))
        for x, side, text in ((0.01, "left", "\u2190 PESC better"), (0.99, "right", "PESC worse \u2192")):
            axes.text(x, 1.0, text, transform=axes.transAxes, ha=side, va="bottom", color=colour("muted"))
        return _svg(figure, "forest")


def heat_map(name: str, rows: Mapping[int, np.ndarray], num_layers: int, limit: float) -> Markup:
    """Layers down, experts across. Values run from -limit to limit around the centre; beyond is clipped."""
    width = max(len(row) for row in rows.values())
    cells: dict[int, list[tuple[int, int]]] = {}
    for layer, row in rows.items():
        for expert, value in enumerate(row):
            step = HALF + round(float(np.clip(value / limit, -1, 1)) * HALF)
            cells.setdefault(step, []).append((expert, layer))
    with rc_context(STYLE):
        figure, axes = _blank(3.3, 0.75 + min(max(0.15 * num_layers, 0.8), 12), "expert", "layer")
        for step, spots in sorted(cells.items()):
            # One path per colour, not per cell: the page stays small with many experts.
            axes.add_patch(PathPatch(_tiles(spots), facecolor=colour(f"heat{step}"), linewidth=0))
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(num_layers - 0.5, -0.5)
        axes.xaxis.set_major_locator(_whole(width))
        axes.yaxis.set_major_locator(_whole(num_layers))
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, name)


def bar_chart(name: str, bars: Mapping[int, float], num_layers: int, floor: float, label: str) -> Markup:
    """One bar per layer, with a dashed line at `floor`, what chance alone would give."""
    with rc_context(STYLE):
        figure, axes = _blank(9.6, 2.5, "layer", label)
        axes.bar(list(bars), list(bars.values()), width=0.72, color=colour("pesc"), linewidth=0)
        axes.axhline(floor, color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(-0.6, num_layers - 0.4)
        axes.set_ylim(0, max(max(bars.values()), floor, 1e-6) * 1.1)
        axes.xaxis.set_major_locator(_whole(num_layers))
        axes.grid(False, axis="x")
        return _svg(figure, name)


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


def _blank(width: float, height: float, across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.grid(color=colour("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour("grid"))
    axes.tick_params(length=0, labelcolor=colour("muted"))
    axes.set_xlabel(across, color=colour("muted"))
    axes.set_ylabel(up, color=colour("muted"))
    return figure, axes


def _plain_tokens(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _whole(count: int) -> FixedLocator:
    return FixedLocator(range(0, count, 1 if count <= 12 else 5 if count <= 50 else 10))


def _tiles(spots: Sequence[tuple[int, int]]) -> Outline:
    corners = np.array([(-0.47, -0.46), (0.47, -0.46), (0.47, 0.46), (-0.47, 0.46), (-0.47, -0.46)])
    vertices = (np.array(spots, dtype=float)[:, None, :] + corners).reshape(-1, 2)
    codes = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY] * len(spots)
    return Outline(vertices, codes)


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an element to put into a page: ids made unique, colours made variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|defs)>\s*<(rdf:RDF|style).*?</\1>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    rest = re.sub(r'(\bid="|xlink:href="#|url\(#)', lambda found: f"{found[0]}{name}-", rest)
    rest = rest.replace("xlink:href", "href")
    rest = re.sub(r"#00([0-9a-f]{2})fe", lambda found: f"var(--{ROLES[int(found[1], 16)]})", rest)
    return Markup(f'<svg {box[0]} role="img" class="chart">{rest}')
