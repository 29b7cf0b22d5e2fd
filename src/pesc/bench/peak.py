"""Peak memory of a step, counted in tensors: exact, and the same at every run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(step: Callable[[], object], resident: Iterable[torch.Tensor]) -> int:
    """Bytes of all tensors alive at the fullest moment of a step.

    Args:
        step: ends with no more tensors alive than it began with.
        resident: what is there before it starts (weights, optimizer state); tensors of others do not count.

    Returns:
        Bytes. Not counted: what libraries hold outside torch's allocator, and what the allocator wastes.
    """
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in resident}
    return sum(held.values()) + (_cuda_growth(step) if torch.cuda.is_available() else _cpu_growth(step))


def cpu_profiler(*, profile_memory: bool = False, record_shapes: bool = False) -> profile:
    """torch's profiler of what runs on the CPU, without the notices that it writes to stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(activities=[ProfilerActivity.CPU], profile_memory=profile_memory, record_shapes=record_shapes)


def _cuda_growth(step: Callable[[], object]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def _cpu_growth(step: Callable[[], object]) -> int:
    with cpu_profiler(profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak
