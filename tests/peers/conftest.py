"""What the peers' tests share: which of them are expected to fail for a crafted model, and the counts at the end.

A class with `crafted = True` runs another project's tests on crafted models; its twin runs them on the dense ones.
`DIFFERENT` of a file maps tests that crafted models fail on purpose to the reason; one that passes is an error.
What the dense twin fails here, it fails without us: it is counted, and no error.
`ELSEWHERE` maps tests that no model can pass here to the reason. Keys are regular expressions of "class::test".
Cases with a `model_id` run if it is in `RUN`.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _runs(item)]
    for path in {item.path for item in items if item.path.parent == Path(__file__).parent}:
        here = [item for item in items if item.path == path]
        _mark(here, "ELSEWHERE", lambda reason: pytest.mark.skip(reason=f"not here: {reason}"))
        for item in here:
            if getattr(item.cls, "crafted", None) is False:
                item.add_marker(pytest.mark.xfail(strict=False, reason="fails on dense models too"))
        crafted = [item for item in here if getattr(item.cls, "crafted", False)]
        _mark(crafted, "DIFFERENT", lambda reason: pytest.mark.xfail(strict=True, reason=reason))


def _runs(item: Any) -> bool:
    model_id = getattr(item, "callspec", None) and item.callspec.params.get("model_id")
    return not model_id or model_id in item.module.RUN


def _mark(items: list[Any], table: str, mark: Any) -> None:
    listed = getattr(items[0].module, table, {}) if items else {}
    items = [item for item in items if item.cls]
    for key, reason in listed.items():
        for item in items:
            if re.match(key, f"{item.cls.__name__}::{item.name}"):
                item.add_marker(mark(reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            where = getattr(report, "nodeid", "")
            if "tests/peers/" in where and outcome in ("passed", "failed", "xfailed", "xpassed", "skipped", "error"):
                kind = "crafted" if "Crafted" in where else "dense" if "Dense" in where else "ours"
                counts.setdefault((Path(where.split("::")[0]).stem, kind), Counter())[outcome] += 1
    for (file, kind), counter in sorted(counts.items()):
        told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counter.items()))
        terminalreporter.write_line(f"{file.removeprefix('test_'):14} {kind:8} {told}")
