"""A study as one self-contained page with charts to touch, and its charts as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from pesc.report import charts, findings, specialisation
from pesc.report.charts import Spec
from pesc.report.findings import Curves
from pesc.report.results import Arm, ExpertCounts, Results, Run, read_evaluations, read_metrics, read_results

PAGE, PICTURES, OVERVIEW = "report.html", "report", "overview"


def write_report(folder: Path) -> Path:
    """Draw what a study has measured so far.

    Args:
        folder: holds results.json; gets report.html, and a picture of each chart in report/.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError, ValueError: as `read_results` and `read_metrics` do.
    """
    results = read_results(folder)
    curves = [(arm, run, read_metrics(folder / run.folder)) for arm, run in results.runs() if run.training]
    drawn = dict(make_charts(results, curves, held_out_rows(folder, curves)))
    (folder / PAGE).write_text(render(results, curves, drawn), encoding="utf-8")
    shown = [drawn[name] for name in ("verdict-0", "loss", "load-0") if name in drawn]
    overview = {OVERVIEW: charts.stacked(shown, findings.headline(results))} if shown else {}
    _pictures(folder / PICTURES, drawn | overview)
    return folder / PAGE


def _pictures(folder: Path, drawn: Mapping[str, Spec]) -> None:
    folder.mkdir(exist_ok=True)
    for name, spec in drawn.items():
        # The overview is large, and meant for a README.
        (folder / f"{name}.png").write_bytes(charts.picture(spec, scale=1 if name == OVERVIEW else 1.5))


def render(results: Results, curves: Curves, drawn: Mapping[str, Spec]) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(signed=findings.signed, count=findings.count)
    template = resources.files("pesc.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        results=results,
        headline=findings.headline(results),
        lead=findings.lead(results),
        verdicts=[(findings.verdict(cases), cases) for cases in _verdicts(results)],
        losses=[(arm, _losses(results, arm)) for arm in results.arms],
        curve_notes=findings.curve_notes(curves),
        routed=[_routed(arm, run, experts, curves) for arm, run, experts in _shown(results)],
        answers=_answers(results),
        caveats=findings.caveats(results),
        settings=_settings(results),
        # As wide as its place in the page, unless it is a row of maps.
        charts={name: spec | ({"width": "container"} if "width" in spec else {}) for name, spec in drawn.items()},
        themes={name: charts.theme(name) for name in charts.COLOURS},
        colours=charts.COLOURS,
        library=charts.library(),
    )


def make_charts(results: Results, curves: Curves, held_out: charts.Rows = ()) -> Iterator[tuple[str, Spec]]:
    """Every chart of the page by the id of its place there."""
    arms = [arm.name for arm in results.arms if arm.trained]
    verdicts = _verdicts(results)
    edges = [abs(edge) for cases in verdicts for c in cases for edge in (c.estimate.low, c.estimate.high)]
    edge = 1.05 * max([value for value in edges if np.isfinite(value)] + [1e-3])
    for index, cases in enumerate(verdicts):
        yield f"verdict-{index}", charts.forest(cases, edge)
    for field, name, even in (
        ("loss", "loss", None),
        ("load_entropy", "load entropy", 1.0),
        ("aux_loss", "balance loss / even", 1.0),
    ):
        if rows := _curve_rows(curves, field):
            yield field, charts.curves(rows, arms, name, even)
    if held_out:
        yield "held_out", charts.curves(held_out, arms, "held-out loss")
    for index, (_, _, experts) in enumerate(_shown(results)):
        yield from _maps(experts, index)
    routed = [(arm, run, run.experts) for arm, run in results.runs() if run.experts and run.experts.layers]
    if routed and len(results.domains) > 1:
        rows = [row for found in routed for row in _divergence_rows(*found)]
        yield "divergence", charts.divergence(rows, arms, max(len(e.num_experts_per_tok) for _, _, e in routed))


def _verdicts(results: Results) -> list[list[findings.Comparison]]:
    """The comparisons with trained arms; that training helps is a matter of the table."""
    return [findings.compare(results, other) for other in results.others if other.trained]


def _losses(results: Results, arm: Arm) -> list[tuple[str, float]]:
    """By domain: an arm's loss in words, and how far it lies from the first arm's."""
    losses, first = ([results.losses(a, domain) for domain in results.domains] for a in (arm, results.arms[0]))
    return [(findings.over_seeds(own), own.mean() - base.mean()) for own, base in zip(losses, first, strict=True)]


def _curve_rows(curves: Curves, field: str) -> list[dict[str, Any]]:
    rows = []
    for arm, run, metrics in curves:
        values = metrics[field]
        if field == "aux_loss" and run.experts:
            values = values / max(1, sum(chosen or 0 for chosen in run.experts.num_experts_per_tok))
        if field == "loss" or np.isfinite(values).any():
            for at, raw, smooth in zip(metrics["tokens"], values, charts.smooth(values), strict=True):
                numbers = {"tokens": charts.finite(at), "raw": charts.finite(raw), "smooth": charts.finite(smooth)}
                rows.append({"arm": arm.name, "run": arm.label(run), **numbers})
    return rows


def held_out_rows(folder: Path, curves: Curves) -> list[dict[str, Any]]:
    """A curve for each run and held-out source."""
    return [
        {"arm": arm.name, "run": f"{arm.label(run)}, {name}", "tokens": charts.finite(line.tokens)}
        | dict.fromkeys(("raw", "smooth"), charts.finite(loss))
        for arm, run, _ in curves
        for line in read_evaluations(folder / run.folder)
        for name, loss in line.held_out.items()
    ]


def _shown(results: Results) -> list[tuple[Arm, Run, ExpertCounts]]:
    """Of each arm with a choice of experts its first run: experts of different seeds have nothing in common."""
    first = [(arm, arm.runs[0], arm.runs[0].experts) for arm in results.arms]
    return [(arm, run, experts) for arm, run, experts in first if experts and experts.layers]


def _maps(experts: ExpertCounts, index: int) -> Iterator[tuple[str, Spec]]:
    rows = []
    for layer in experts.layers:
        shares_DE = np.array([experts.shares(domain, layer) for domain in experts.counts])
        shifts_DE = shares_DE - shares_DE.mean(0)
        for (at, expert), share in np.ndenumerate(shares_DE):
            place = {"domain": list(experts.counts)[at], "layer": layer, "expert": expert}
            numbers = {"share": share, "load": share * shares_DE.shape[1], "shift": shifts_DE[at, expert]}
            rows.append(place | {key: charts.finite(value, 4) for key, value in numbers.items()})
    loads, shifts = (np.array([row[key] for row in rows], dtype=float) for key in ("load", "shift"))
    with np.errstate(divide="ignore"):
        spread = np.quantile(np.abs(np.log2(loads)), 0.95, method="lower")
    # A few dead experts (log of 0) must not decide the scale of all the others.
    limit = next((size for size in (0.5, 1.0, 2.0) if spread <= size), 3.0)
    depth = len(experts.num_experts_per_tok)
    yield f"load-{index}", charts.expert_map(rows, depth, limit)
    if len(experts.counts) > 1:
        limit = max(float(np.quantile(np.abs(shifts), 0.98)), 0.01)
        yield f"shift-{index}", charts.expert_map(rows, depth, limit, shift=True)


def _divergence_rows(arm: Arm, run: Run, experts: ExpertCounts) -> list[dict[str, Any]]:
    found = specialisation.between_domains(experts)
    names = {"arm": arm.name, "run": arm.label(run)}
    return [
        {**names, "layer": layer, "bits": charts.finite(bits, 4), "noise": charts.finite(found.noise[layer], 4)}
        for layer, bits in found.bits.items()
    ]


def _routed(arm: Arm, run: Run, experts: ExpertCounts, curves: Curves) -> dict[str, Any]:
    """What is said of an arm with a choice of experts."""
    metrics = next((columns for _, other, columns in curves if other is run), None)
    return {
        "label": arm.label(run),
        "load_notes": specialisation.load_notes(experts, metrics),
        "notes": specialisation.notes(experts) if len(experts.counts) > 1 else None,
        "plain_layers": [layer for layer, chosen in enumerate(experts.num_experts_per_tok) if chosen is None],
    }


def _answers(results: Results) -> list[dict[str, Any]]:
    """The questions with an answer of each arm's first run; the first question of each domain is shown unfolded."""
    asked = [question.domain for question in results.questions]
    return [
        {
            "question": question,
            "open": asked.index(question.domain) == index,
            "columns": [("reference", question.reference)]
            + [(arm.name, arm.runs[0].answers[index]) for arm in results.arms],
        }
        for index, question in enumerate(results.questions)
    ]


def _settings(results: Results) -> dict[str, dict[str, str]]:
    """Settings of the trained arms by name: a value for each arm, or one for all under the empty name."""
    trained = [arm for arm in results.arms if arm.settings]
    found: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for arm in trained for key in arm.settings):
        values = {arm.name: arm.settings.get(key, "\u2013") for arm in trained}
        found[key] = {"": next(iter(values.values()))} if len(set(values.values())) == 1 else values
    return found
