"""The machine in one line, for results."""

from __future__ import annotations

import os
import platform

import torch


def describe_machine() -> str:
    """The processor or GPU, and torch's version: the place of a measurement."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {platform.machine()}, {capability}, torch {torch.__version__}"
