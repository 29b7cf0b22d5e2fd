"""Peak memory of a part of the program."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from pesc.machine.allocator import release_freed_memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """Filled when the measured block ends."""

    gigabytes: float = 0.0
    """Of the GPU if there is one, else of the process (10^9 bytes)."""


@contextmanager
def measure_peak_memory() -> Iterator[PeakMemory]:
    """Measure the largest amount of memory in use during the block.

    On Linux the process's high-water mark is reset first; elsewhere it is that of the whole program so far.
    """
    peak = PeakMemory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        release_freed_memory()  # freed by earlier work
        with suppress(OSError):  # not Linux, or a container that forbids it
            _RESET.write_text("5")
    try:
        yield peak
    finally:
        peak.gigabytes = _peak_bytes() / 1e9


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
