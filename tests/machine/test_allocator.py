"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Tensors of 36 MB, above what glibc ever keeps by default, as a step makes and frees them.
SCRIPT = """
import resource, sys, torch
from pesc.machine.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
ones = torch.ones(9 << 20)
def step():
    doubled = ones * 2
    (doubled + ones).relu_()
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_later_tensors_find_the_memory_of_earlier_ones() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", SCRIPT, mode], check=True, capture_output=True).stdout)
        for mode in ("keep", "default")
    }
    assert 4 * faults["keep"] < faults["default"]


SCARCE = """
import psutil, torch, pesc.machine.allocator as allocator
assert allocator.keep_freed_memory()
torch.ones(50 << 20)
process = psutil.Process()
for allocator._SCARCE in (0.0, 2.0):
    assert allocator.release_where_scarce() == (allocator._SCARCE > 1)
    print(process.memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_goes_back_only_where_memory_is_scarce() -> None:
    output = subprocess.run([sys.executable, "-c", SCARCE], check=True, capture_output=True).stdout
    kept, left = map(int, output.split())
    assert kept - left > 180e6  # most of the tensor's 210 MB
