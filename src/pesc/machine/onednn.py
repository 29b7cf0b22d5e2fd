"""oneDNN, torch's library for products on CPUs, switched off for operations that it slows down."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

FEW_TOKENS = 32


class _Off:
    """Inside the block, torch uses its own kernels in the whole process.

    Another thread's operations meanwhile are slower, not wrong. Only who found the switch on turns it on again, so
    that threads which overlap cannot leave it off.
    """

    def __enter__(self) -> None:
        self.was_on = torch.backends.mkldnn.enabled
        if self.was_on:
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]

    def __exit__(self, *_: Any) -> None:
        if self.was_on:
            torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


def without_onednn(x_TD: torch.Tensor, *, up_to: int) -> AbstractContextManager[None]:
    """A block for small operations on a CPU: oneDNN sets up each for 10 to 20 microseconds, more than they take.

    Args:
        x_TD: their input; the block does nothing for other devices and under `torch.compile`.
        up_to: the largest T for which it acts.
    """
    if x_TD.shape[0] > up_to or x_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    return _Off()
