"""JSON, folders and files that appear complete or not at all, and the small files beside weights."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_COMPANIONS = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|chat_template|generation_config|tokenizer_config)\.json"
    r"|[\w.-]+\.model|vocab\.txt|merges\.txt|chat_template\.jinja|(LICENSE|NOTICE|USE_POLICY)(\.txt|\.md)?"
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the file holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: it is no model's folder, or not complete")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}): write or download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def write_json(path: Path, values: Any, *, sort_keys: bool = False) -> None:
    """Write JSON, indented, with a final newline."""
    text = json.dumps(values, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` only when the block succeeds.

    Raises:
        FileExistsError: `out` is there already.
        OSError: the disk is full; what was written is removed.
    """
    with _staged(out) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A file to write that becomes `out` only when the block succeeds; errors as of `new_folder`."""
    with _staged(out) as partial:
        yield partial


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another name, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as stage:
        try:
            yield Path(stage) / out.name
            (Path(stage) / out.name).replace(out)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                message = f"the disk is full: {out} was not written; free some space"
                raise OSError(errno.ENOSPC, message, str(out)) from error
            raise


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
