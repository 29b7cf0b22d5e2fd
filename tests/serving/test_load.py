"""The server under load and attack, for some seconds; benchmarks/serve_load.py takes ten minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


@pytest.mark.slow
def test_every_answer_is_that_of_the_request_alone_and_nothing_is_left_running() -> None:
    command = [sys.executable, str(SCRIPT), "--clients", "12", "--minutes", "0.2"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(printed[printed.index("{") :])
    assert figures["requests"] > 12
    assert figures["refused"] > 0
    assert figures["wrong examples"] == []
    assert figures["processor share when idle"] < 0.3
