"""A finished demo run as one self-contained page: `write_report(run)` makes `run/report.html`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from pesc.report import charts, findings
from pesc.report.results import BASE, DENSE, PAIR, PESC, Results, Routing, Run, read_run

SETUP_LABELS = {
    "model": "dense model",
    "num_experts": "experts",
    "num_experts_per_tok": "experts per token",
    "adapter_dim": "adapter size",
    "lora_r": "LoRA rank",
    "steps": "steps",
    "tokens": "training tokens",
    "seed": "seed",
    "seconds": "seconds",
    "peak_memory_gb": "peak memory (GB)",
    "machine": "machine",
}


def write_report(run: Path) -> Path:
    """Read the files of a finished run, write `report.html` beside them and return its path.

    A missing file is a FileNotFoundError, a malformed one a ValueError; both name the file and what is
    missing or wrong in it.
    """
    page = render(read_run(run))
    target = run / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def render(run: Run) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=findings.number, signed=findings.signed, millions=findings.millions)
    template = resources.files("pesc.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    comparisons = findings.compare(run.results)
    return environment.from_string(template).render(
        title=f"PESC on {run.results.setup['model']}",
        headline=findings.headline(comparisons),
        comparisons=comparisons,
        forest=charts.forest_chart(comparisons, findings.CLEAR),
        lead=[findings.against_base(run.results), findings.cost(run.results)],
        caveats=findings.caveats(run.results),
        results=run.results,
        base=run.results.model(BASE),
        pairs=_pairs(run.results),
        setup=_setup(run.results.setup),
        answers=_answers(run),
        steps=range(2 * charts.HALF + 1),
        half=charts.HALF,
        **_curves(run),
        **_heat(run.routing),
        **_differing(run),
    )


def _pairs(results: Results) -> list[tuple[str, dict[str, tuple[float, float, str]]]]:
    """Every paired difference of the results, the one that matters first."""
    order = sorted(results.differences, key=lambda pair: pair != PAIR)
    return [
        (
            pair.replace(" - ", " \u2212 "),
            {
                domain: (mean, error, findings.outcome(mean, error, results.held_out_rows[domain]))
                for domain, (mean, error) in results.differences[pair].items()
            },
        )
        for pair in order
    ]


def _setup(setup: dict[str, Any]) -> list[tuple[str, str]]:
    known = [key for key in SETUP_LABELS if key in setup]
    return [
        (SETUP_LABELS.get(key, key), _shown(setup[key]))
        for key in [*known, *(key for key in setup if key not in SETUP_LABELS)]
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_shown(inner) for inner in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _answers(run: Run) -> list[dict[str, Any]]:
    """The answers with their columns; the first of each domain is shown unfolded."""
    seen: set[str] = set()
    shown: list[dict[str, Any]] = []
    for answer in run.answers:
        columns = [
            ("reference", answer["reference"]),
            (BASE, answer["base"]),
            (DENSE, answer["dense"]),
            (PESC, answer["pesc"]),
        ]
        shown.append({**answer, "columns": columns, "open": answer["domain"] not in seen})
        seen.add(answer["domain"])
    return shown


def _curves(run: Run) -> dict[str, Any]:
    least = sum(run.routing.num_experts_per_tok[layer] for layer in run.routing.sparse_layers)
    tokens, aux = run.pesc["tokens"], run.pesc["aux_loss"] / least
    return {
        "loss_curves": charts.loss_chart(
            [
                (DENSE, "dense", run.dense["tokens"], run.dense["loss"]),
                (PESC, "pesc", tokens, run.pesc["loss"]),
            ]
        ),
        "balance_curve": charts.line_chart("balance", "balance", tokens, run.pesc["balance"], 1.0),
        "aux_curve": charts.line_chart("aux", "balance loss / even", tokens, aux, 1.0),
        "curve_notes": findings.curve_notes(run),
        "balance_notes": findings.balance_notes(run.pesc, run.routing),
        "speeds": [
            (name, float(np.nanmedian(metrics["tokens_per_second"])))
            for name, metrics in ((DENSE, run.dense), (PESC, run.pesc))
            if np.isfinite(metrics["tokens_per_second"]).any()
        ],
    }


def _heat(routing: Routing) -> dict[str, Any]:
    """A map per domain of load against even load, on a log scale: half and double lie equally far from 1."""
    with np.errstate(divide="ignore"):
        logs = {
            domain: {layer: np.log2(load) for layer, load in findings.loads_of(routing, domain).items()}
            for domain in routing.shares
        }
    spread = np.abs(np.concatenate([row for rows in logs.values() for row in rows.values()]))
    # A few dead experts (log of 0) must not decide the scale of all the others.
    limit = next((size for size in (0.5, 1.0, 2.0) if np.quantile(spread, 0.95, method="lower") <= size), 3.0)
    plain = [layer for layer in range(routing.num_layers) if layer not in routing.sparse_layers]
    return {
        "heat_maps": [
            (domain, charts.heat_map(f"heat{index}", rows, routing.num_layers, limit))
            for index, (domain, rows) in enumerate(logs.items())
        ],
        "heat_scale": [f"\u2264 {2**-limit:.3g}\u00d7", "even", f"\u2265 {2**limit:.3g}\u00d7"],
        "plain_layers": plain,
        "share_tables": {
            domain: [(layer, [f"{share:.1%}" for share in row]) for layer, row in enumerate(rows) if row is not None]
            for domain, rows in routing.shares.items()
        },
    }


def _differing(run: Run) -> dict[str, Any]:
    """Where the domains part; nothing to show with one domain."""
    routing = run.routing
    if len(routing.shares) < 2:
        return {
            "shift_maps": [],
            "shift_scale": [],
            "divergence": None,
            "divergence_most": 0.0,
            "divergence_notes": "",
        }
    found = findings.specialisation(routing, run.results.held_out_tokens)
    shifts = {domain: findings.shifts_of(routing, domain) for domain in routing.shares}
    spread = np.abs(np.concatenate([row for rows in shifts.values() for row in rows.values()]))
    limit = max(float(np.quantile(spread, 0.98)), 0.01)
    points = f"{100 * limit:.1f} points"
    return {
        "shift_maps": [
            (domain, charts.heat_map(f"shift{index}", rows, routing.num_layers, limit))
            for index, (domain, rows) in enumerate(shifts.items())
        ],
        "shift_scale": [f"\u2264 \u2212{points}", "average", f"\u2265 +{points}"],
        "divergence": charts.bar_chart("divergence", found.bits, routing.num_layers, found.noise, "bits"),
        "divergence_most": found.most,
        "divergence_notes": findings.specialisation_notes(found, len(routing.shares)),
    }
