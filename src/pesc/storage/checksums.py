"""SHA256SUMS: the hashes of a folder's files, written when it is made; `sha256sum -c SHA256SUMS` checks them too."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from pesc.storage.files import file_sha256

SUMS = "SHA256SUMS"
NEEDED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""Patterns of the files that a model needs; a download leaves out all others."""
SMALL = 64 * 1024**2
"""Bytes of a file that is hashed whenever its folder is opened: all but large weights."""
CARD = "README.md"  # for people, who may edit it
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/]+)")


def write_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write a folder's SHA256SUMS; every file is read once.

    Args:
        folder: the files are its own, not those of folders in it.
        names: files to list; by default all but the model card.
    """
    if names is None:
        names = [file.name for file in folder.iterdir() if file.is_file() and file.name not in (SUMS, CARD)]
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_checksums(folder: Path, limit: float = float("inf")) -> bool:
    """Compare a folder's files with its SHA256SUMS.

    Args:
        folder: it need not have any.
        limit: only files of at most so many bytes are hashed.

    Returns:
        Whether the folder has a SHA256SUMS.

    Raises:
        ValueError: naming every file that differs or is missing, and weights that are not listed.
    """
    if not (folder / SUMS).is_file():
        return False
    with (folder / SUMS).open(encoding="utf-8", errors="replace") as stream:
        lines = stream.read(SMALL).splitlines()
    listed = {match[2]: match[1] for line in lines if (match := _LINE.fullmatch(line))}
    wrong = [] if listed and len(listed) == len(lines) else [f"{SUMS} is damaged"]
    for name, wanted in listed.items():
        file = folder / name
        if not file.is_file() and any(fnmatch(name, pattern) for pattern in NEEDED):
            wrong.append(f"{name} is missing")
        elif file.is_file() and file.stat().st_size <= limit and file_sha256(file) != wanted:
            wrong.append(f"{name} was changed")
    wrong += [f"{file.name} was added" for file in sorted(folder.glob("*.safetensors")) if file.name not in listed]
    if wrong:
        raise ValueError(
            f"{folder} is not as it was written, by its {SUMS}: {', '.join(wrong)}; get these files again, or delete "
            f"{SUMS} if the change is yours"
        )
    return True
