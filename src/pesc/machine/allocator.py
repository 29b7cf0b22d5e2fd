"""The C library's memory allocator, which decides how fast a CPU trains."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1
_MADV_HUGEPAGE = 14  # mman.h
_HUGE_PAGE = 2 << 20
_SCARCE = 0.25  # of the machine's memory


@functools.cache  # once is enough, and each time would set more of the address space aside
def keep_freed_memory() -> bool:
    """On a CPU, make glibc keep the memory of freed tensors for the next ones, in huge pages, for the whole process.

    By default it asks the kernel for every large tensor anew, and the kernel clears each page. docs/log.md has the
    cost.

    Returns:
        Whether the C library took the setting; False with a GPU, or if the library is not glibc.
    """
    libc = _glibc()
    if libc is None or torch.cuda.is_available():
        return False
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)):
        return False
    _ask_for_huge_pages(libc)
    return True


def release_freed_memory() -> None:
    """Give the memory that glibc keeps back to the kernel, once."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def release_where_scarce() -> bool:
    """`release_freed_memory` if less than a quarter of the machine's memory is available: for between steps.

    Steps with tensors of ever new sizes leave more and more pieces that fit no later tensor.

    Returns:
        Whether memory was given back.
    """
    memory = psutil.virtual_memory()
    scarce = memory.available < _SCARCE * memory.total
    if scarce:
        release_freed_memory()
    return scarce


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Let the heap grow by half of the machine's memory, marked for huge pages; it takes none of it yet.

    Where no piece that was freed fits a tensor, the heap still grows, and a huge page has one page fault for 512.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    block = libc.malloc(size)
    if block:  # else the machine limits address space, and there are no huge pages
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, (block + size - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(block)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
