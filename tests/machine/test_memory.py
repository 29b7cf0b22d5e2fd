"""Peak memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from pesc.machine import memory


def test_a_mark_that_cannot_be_reset_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some containers forbid it, though the file's mode says otherwise."""
    monkeypatch.setattr(memory, "_RESET", Path("/proc/version"))
    with memory.measure_peak_memory() as peak:
        pass
    assert peak.gigabytes > 0
