"""The C library's memory allocator, which decides how fast a CPU trains."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """On a CPU, make glibc keep the memory of freed tensors for the next ones, for the rest of the process.

    By default it asks the kernel for every large tensor anew, and the kernel clears each page. docs/log.md has what
    that costs.

    Returns:
        Whether the C library took the setting; False with a GPU, or where the library is not glibc.
    """
    libc = _glibc()
    if libc is None or torch.cuda.is_available():
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def release_freed_memory() -> None:
    """Give what glibc keeps back to the kernel, once."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
