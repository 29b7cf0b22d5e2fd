"""A bounded sample of the fuzzer: nothing damaged is accepted as another model, and every refusal is one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.damage import FAMILIES
from fuzz.folders import KINDS
from fuzz.outcomes import cases


def test_cases_are_the_same_each_time_and_cover_kinds_and_damages() -> None:
    chosen = cases(1000, 0, list(KINDS))
    assert chosen == cases(1000, 0, list(KINDS)) != cases(1000, 1, list(KINDS))
    assert {case.kind for case in chosen} == set(KINDS)
    assert {case.damage for case in chosen} == {name for damages in FAMILIES.values() for name in damages}


@pytest.mark.slow
def test_a_sample_of_damaged_folders_is_refused_or_right() -> None:
    # In a process of its own: the fuzzer forks, and threads of this one would not survive that.
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "91", "--seed", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
