"""A verification's result for the terminal."""

from __future__ import annotations

from rich.console import Console

from pesc.interop.verify.findings import Report

_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}


def show_report(report: Report, console: Console) -> None:
    """Print the findings, the facts in short, and the verdict."""
    for finding in report.findings:
        console.print(f"{finding.severity}: ", style=_STYLES[finding.severity], end="", highlight=False)
        console.print(finding.message, markup=False, highlight=False)
    facts = ", ".join(f"{key} {value}" for key, value in report.facts.items() if isinstance(value, int | str))
    console.print(f"{report.path}: {report.kind}; {facts}", style="dim", markup=False, highlight=False)
    if report.complete:
        console.print("[green]complete[/green]: every promised expert is there")
    else:
        console.print("[red]not complete[/red]")
