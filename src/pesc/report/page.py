"""A study as one self-contained page with charts to touch, and its charts as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from pesc.report import charts, findings, specialisation
from pesc.report.charts import Spec
from pesc.report.findings import Comparison
from pesc.report.results import Metrics, Results, Run, read_metrics, read_results

PAGE, PICTURES, OVERVIEW = "report.html", "report", "overview"
Curves = Sequence[tuple[Run, Metrics]]


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
    curves = [(run, read_metrics(folder / run.folder)) for run in results.runs if run.measured.training]
    drawn = dict(make_charts(results, curves))
    (folder / PAGE).write_text(render(results, curves, drawn), encoding="utf-8")
    shown = [drawn[name] for name in ("verdict-0", "losses", "load-0") if name in drawn]
    overview = {OVERVIEW: charts.stacked(shown, findings.headline(results))} if shown else {}
    _pictures(folder / PICTURES, drawn | overview)
    return folder / PAGE


def _pictures(folder: Path, drawn: Mapping[str, Spec]) -> None:
    folder.mkdir(exist_ok=True)
    for name, chart in drawn.items():
        (folder / f"{name}.png").write_bytes(charts.picture(chart))


def render(results: Results, curves: Curves, drawn: Mapping[str, Spec]) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=findings.number, signed=findings.signed, count=findings.count)
    template = resources.files("pesc.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=f"PESC on {results.model}",
        headline=findings.headline(results),
        lead=[text for text in (findings.against_base(results), findings.cost(results)) if text],
        verdicts=[(name, findings.verdict(cases), cases) for name, cases in _verdicts(results)],
        results=results,
        losses=_losses(results),
        pairs=[findings.compare(results, *pair) for pair in results.comparisons],
        curve_notes=findings.curve_notes(results, curves),
        routed=_routed(results, curves),
        most=np.log2(len(results.domains)),
        answers=_answers(results),
        caveats=findings.caveats(results),
        settings=_settings(results),
        charts={name: charts.for_page(chart) for name, chart in drawn.items()},
        themes={name: charts.theme(name) for name in charts.COLOURS},
        colours=charts.COLOURS,
        library=charts.library(),
    )


def make_charts(results: Results, curves: Curves) -> Iterator[tuple[str, Spec]]:
    """Every chart of the page by the id of its place there."""
    arms = list(dict.fromkeys(run.arm for run, _ in curves))
    verdicts = list(_verdicts(results))
    edges = [abs(edge) for _, cases in verdicts for c in cases for edge in (c.estimate.low, c.estimate.high)]
    edge = 1.05 * max([value for value in edges if np.isfinite(value)] + [1e-3])
    for name, cases in verdicts:
        yield name, charts.forest(cases, edge)
    if curves:
        yield "losses", charts.curves(_curve_rows(results, curves, "loss"), arms, "loss")
    for field, label in (("load_entropy", "load entropy"), ("aux_loss", "balance loss / even")):
        rows = _curve_rows(results, [(run, m) for run, m in curves if np.isfinite(m[field]).any()], field)
        if rows:
            yield field, charts.curves(rows, arms, label, even=1.0)
    for index, run in enumerate(_shown(results)):
        yield from _maps(run, index)
    rows = [row for run in _routed_runs(results) for row in _divergence_rows(results, run)]
    if rows:
        yield "divergence", charts.divergence(rows, arms, 1 + max(row["layer"] for row in rows))


def _verdicts(results: Results) -> Iterator[tuple[str, list[Comparison]]]:
    """The comparisons of two trained arms; that training helps is a matter of the table."""
    trained = {run.arm for run in results.runs if run.measured.training}
    pairs = [pair for pair in results.comparisons if trained.issuperset(pair)]
    for index, pair in enumerate(pairs):
        yield f"verdict-{index}", findings.compare(results, *pair)


def _losses(results: Results) -> list[dict[str, Any]]:
    """A row for each arm: its losses, and how far they lie from the first arm's."""
    base = {domain: results.losses(results.names[0], domain).mean() for domain in results.domains}
    rows = []
    for arm in results.names:
        losses = {domain: results.losses(arm, domain) for domain in results.domains}
        cells = [(findings.over_seeds(loss), loss.mean() - base[domain]) for domain, loss in losses.items()]
        rows.append({"arm": arm, "cells": cells, "parameters": results.of(arm)[0].measured.parameters})
    return rows


def _curve_rows(results: Results, curves: Curves, field: str) -> list[dict[str, Any]]:
    rows = []
    for run, metrics in curves:
        values = metrics[field]
        if field == "aux_loss" and (routing := run.measured.routing):
            values = values / max(1, sum(chosen for chosen in routing.num_experts_per_tok if chosen))
        names = {"arm": run.arm, "run": findings.label(results, run)}
        columns = zip(metrics["tokens"], values, charts.smooth(values), strict=True)
        for at, raw, smooth in columns:
            if np.isfinite(at):
                rows.append({**names, "tokens": int(at), "raw": charts.finite(raw), "smooth": charts.finite(smooth)})
    return rows


def _routed_runs(results: Results) -> list[Run]:
    """The runs whose routers have a choice."""
    return [run for run in results.runs if run.measured.routing and run.measured.routing.layers]


def _shown(results: Results) -> list[Run]:
    """Of each arm with a choice of experts its first run: experts of different seeds have nothing in common."""
    return list({run.arm: run for run in reversed(_routed_runs(results))}.values())[::-1]


def _maps(run: Run, index: int) -> Iterator[tuple[str, Spec]]:
    routing = run.measured.routing
    assert routing is not None
    rows: list[dict[str, Any]] = []
    for domain in routing.counts:
        loads, shifts = specialisation.loads_of(routing, domain), specialisation.shifts_of(routing, domain)
        for layer in routing.layers:
            for expert, (load, shift) in enumerate(zip(loads[layer], shifts[layer], strict=True)):
                numbers = {"share": load / len(loads[layer]), "load": load, "shift": shift}
                place = {"domain": domain, "layer": layer, "expert": expert}
                rows.append(place | {key: charts.finite(value, 4) for key, value in numbers.items()})
    depth = len(routing.num_experts_per_tok)
    with np.errstate(divide="ignore"):
        spread = np.abs(np.log2([row["load"] for row in rows]))
    # A few dead experts (log of 0) must not decide the scale of all the others.
    limit = next((size for size in (0.5, 1.0, 2.0) if np.quantile(spread, 0.95, method="lower") <= size), 3.0)
    yield f"load-{index}", charts.load_map(rows, depth, limit)
    if len(routing.counts) > 1:
        most = float(np.quantile(np.abs([row["shift"] for row in rows]), 0.98))
        yield f"shift-{index}", charts.shift_map(rows, depth, max(most, 0.01))


def _divergence_rows(results: Results, run: Run) -> list[dict[str, Any]]:
    routing = run.measured.routing
    assert routing is not None
    if len(routing.counts) < 2:
        return []
    found = specialisation.between_domains(routing)
    names = {"arm": run.arm, "run": findings.label(results, run)}
    return [
        {**names, "layer": layer, "bits": charts.finite(bits, 4), "noise": charts.finite(found.noise[layer], 4)}
        for layer, bits in found.bits.items()
    ]


def _routed(results: Results, curves: Curves) -> list[dict[str, Any]]:
    """What is said and drawn of each arm with a choice of experts."""
    found = []
    for index, run in enumerate(_shown(results)):
        routing = run.measured.routing
        assert routing is not None
        metrics = next((columns for other, columns in curves if other is run), None)
        several = len(routing.counts) > 1
        found.append(
            {
                "index": index,
                "label": findings.label(results, run),
                "load_notes": specialisation.load_notes(run, metrics),
                "notes": specialisation.notes(routing) if several else None,
                "plain_layers": [layer for layer, k in enumerate(routing.num_experts_per_tok) if k is None],
                "shares": {
                    domain: [(layer, [f"{s:.1%}" for s in routing.shares(domain, layer)]) for layer in routing.layers]
                    for domain in routing.counts
                },
            }
        )
    return found


def _answers(results: Results) -> list[dict[str, Any]]:
    """The questions with an answer of each arm's first run; the first question of each domain is shown unfolded."""
    seen: set[str] = set()
    shown = []
    for index, question in enumerate(results.questions):
        answers = [(arm, results.of(arm)[0].measured.answers[index]) for arm in results.names]
        columns = [("reference", question.reference), *answers]
        shown.append({"question": question, "columns": columns, "open": question.domain not in seen})
        seen.add(question.domain)
    return shown


def _settings(results: Results) -> dict[str, dict[str, str]]:
    """Settings of the trained arms by name: a value for each arm, or one for all under the empty name."""
    trained = [arm for arm in results.arms if arm.settings]
    found: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for arm in trained for key in arm.settings):
        values = {arm.name: arm.settings.get(key, "\u2013") for arm in trained}
        found[key] = {"": next(iter(values.values()))} if len(set(values.values())) == 1 else values
    return found
