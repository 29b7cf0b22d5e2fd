"""A lock that lets one process at a time write to a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_LOCK = ".lock"


@contextmanager
def locked(folder: Path, target: Path | None = None, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder against other processes for the block; the lock of a process that was killed is free.

    A process may lock a folder that it holds again. The folder is made if it is not there, and removed if it is empty
    at the end.

    Args:
        folder: gets a file that names the process while it is held.
        target: what the error names instead of `folder`.
        wait: wait for a process that holds the folder.

    Raises:
        BlockingIOError: another process holds the folder.
    """
    lock = _acquire(folder / _LOCK, target or folder, wait)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):  # the folder may hold more, or have vanished
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()
            lock.close()


def refuse_vanished(folder: Path) -> None:
    """Before a result gets its name: refuse if its locked folder was removed, and made anew by later writes.

    Raises:
        FileNotFoundError: the lock is gone.
    """
    if not (folder / _LOCK).exists():
        raise FileNotFoundError(f"{folder} was removed while it was written: start again")


def _acquire(path: Path, target: Path, wait: bool) -> TextIO | None:
    """The locked file, or None if this process holds it already."""
    process = f"{os.getpid()} on {platform.node()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        with lock:
            lock.seek(0)
            holder = lock.read()
        if holder == process:
            return None
        raise BlockingIOError(f"process {holder} is at work on {target}: wait for it, or stop it") from None
    except OSError as error:
        # Some network file systems have no locks; work there must not be impossible.
        if error.errno not in (errno.ENOSYS, errno.ENOLCK):
            raise
    if not os.fstat(lock.fileno()).st_nlink:  # its last holder removed it after it was opened here
        lock.close()
        return _acquire(path, target, wait)
    lock.truncate(0)
    with suppress(OSError):  # a full disk, of which the write that follows tells more
        os.write(lock.fileno(), process.encode())
    return lock
