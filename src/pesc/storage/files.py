"""JSON, folders and files that appear complete or not at all, and the small files beside weights."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pesc.storage.lock import locked, refuse_vanished

_MOST_TEXT = 256 * 1024**2  # bytes; tokenizers take up to 40 million, indexes of weights a few
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_COMPANIONS = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|chat_template|generation_config|tokenizer_config)\.json"
    r"|[\w.-]+\.model|vocab\.txt|merges\.txt|chat_template\.jinja|(LICENSE|NOTICE|USE_POLICY)(\.txt|\.md)?"
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the file holds no JSON object, or is larger than any that we read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: it is no model's folder, or not complete")
    refuse_large_text(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}): write or download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def refuse_large_text(path: Path) -> None:
    """Refuse to read a file that is no text of a model.

    Raises:
        ValueError: the file is larger than any.
    """
    if (size := path.stat().st_size) > _MOST_TEXT:
        raise ValueError(f"{path} has {size} bytes, more than the {_MOST_TEXT} that are read: it is damaged")


def write_json(path: Path, values: Any, *, sort_keys: bool = False) -> None:
    """Write JSON, indented, with a final newline; see `write_text`."""
    write_text(path, json.dumps(values, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that holds its old text until it holds all of the new one; errors as of `new_folder`."""
    with _staged(path, replace=True) as partial:
        partial.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_sha256(values: Any) -> str:
    """SHA-256 of plain values as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextmanager
def new_folder(out: Path, *, wait: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `out`, synced to the disk, only when the block succeeds.

    Until then it lies in `.NAME.partial` beside `out`. What a killed process left there is removed.

    Args:
        out: must not exist yet.
        wait: wait for another process that writes `out`.

    Raises:
        FileExistsError: `out` is there already.
        BlockingIOError: another process writes `out`.
        OSError: the disk is full, or the place is gone; what was written is removed.
    """
    with _staged(out, wait=wait) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A file to write that becomes `out` only when the block succeeds; otherwise as `new_folder`."""
    with _staged(out) as partial:
        yield partial


@contextmanager
def _staged(out: Path, *, replace: bool = False, wait: bool = False) -> Iterator[Path]:
    out = out.absolute()
    stage = out.with_name(f".{out.name}.partial")
    partial = stage / out.name
    with locked(stage, out, wait=wait):
        if out.exists() and not replace:
            raise FileExistsError(f"{out} exists already: choose another name, or remove it first")
        _remove(partial)
        try:
            yield partial
            _sync([*partial.rglob("*"), partial])
            refuse_vanished(stage)
            partial.replace(out)
            _sync([out.parent])
        except (OSError, SafetensorError, RuntimeError) as error:
            if (number := _errno_behind(error, stage)) is None:
                raise
            way_out = ": free some space" if number in _FULL else ""
            raise OSError(number, f"{out} was not written, {os.strerror(number)}{way_out}") from error
        finally:
            _remove(partial)


def _errno_behind(error: Exception, stage: Path) -> int | None:
    """The system's error behind one that does not name the place; None for any other error."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _FULL else None
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    # torch.save raises a RuntimeError of its own for every failed write: a write of ours tells why.
    try:
        (stage / "probe").write_bytes(bytes(1 << 20))
    except OSError as ours:
        return ours.errno
    finally:
        _remove(stage / "probe")
    return None


def _sync(paths: list[Path]) -> None:
    """Wait until files and folders are on the disk; a power cut could else leave a name without its content."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or folder, if that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer, generation settings and licence beside the weights, without pointers to code."""
    for file in sorted(source.iterdir()):
        if not file.is_file() or not _COMPANIONS.fullmatch(file.name):
            continue
        if file.name == "tokenizer_config.json":
            values = read_json(file)
            values.pop("auto_map", None)
            write_json(target / file.name, values)
        else:
            shutil.copyfile(file, target / file.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file another name in place of whatever had it: a hard link, or a copy if the file system cannot link."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
