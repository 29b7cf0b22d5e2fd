"""JSON, folders and files that appear complete or not at all, and the small files beside weights."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A file to fill that becomes `out` only when the block succeeds."""
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another name, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        yield Path(folder) / out.name
        (Path(folder) / out.name).replace(out)


_COPIED = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|chat_template|generation_config|tokenizer_config)\.json"
    r"|tokenizer\.model|merges\.txt|chat_template\.jinja|(LICENSE|NOTICE|USE_POLICY)(\.txt|\.md)?"
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer, generation settings and licence beside the weights, without pointers to code."""
    for file in sorted(source.iterdir()):
        if not file.is_file() or not _COPIED.fullmatch(file.name):
            continue
        if file.name == "tokenizer_config.json":
            values = read_json(file)
            values.pop("auto_map", None)
            (target / file.name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(file, target / file.name)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` only when the block succeeds.

    Raises:
        FileExistsError: when `out` is there already.
        OSError: when the disk is full, saying so; what was written is removed.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"the disk is full: {out} was not written; free some space", str(out)
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: when it is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: it is no model's folder, or not whole")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}): write or download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values
