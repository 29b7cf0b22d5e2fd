"""Rows of JSON, JSONL and Parquet files, in pieces that processes can share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
import pyarrow.parquet as pq
from pyarrow import ArrowInvalid

from pesc.storage.hub import download_data

SUFFIXES = (".jsonl", ".json", ".parquet")
PIECE_BYTES = 8 * 1024**2


@dataclass(frozen=True)
class Piece:
    """A part of a file that one process reads. Its bounds depend on the file alone, not on the machine."""

    file: Path
    start: int
    """Of JSONL a byte, of Parquet a row group, of JSON 0."""
    end: int
    first_row: int
    """Number of its first row: a line's, counted from 1."""


def data_files(path: str) -> list[Path]:
    """The files that a source's path means, in the order of their names.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset, or it holds no data file.
    """
    given = Path(path).expanduser()
    if given.is_file():
        if given.suffix not in SUFFIXES:
            raise FileNotFoundError(f"{path}: a data file's name must end in {', '.join(SUFFIXES)}")
        return [given]
    if given.suffix in SUFFIXES:
        raise FileNotFoundError(f"{path}: no such data file")
    folder = given if given.is_dir() else download_data(path)
    found = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise FileNotFoundError(f"{path} holds no file whose name ends in {', '.join(SUFFIXES)}")
    return found


def cut(file: Path) -> tuple[list[Piece], str]:
    """A file's pieces, and the SHA-256 of its bytes."""
    if file.suffix != ".jsonl":
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return (_row_groups(file) if file.suffix == ".parquet" else [Piece(file, 0, 0, 1)]), digest
    pieces, hashed, start, lines = [], hashlib.sha256(), 0, 1
    with file.open("rb") as stream:
        while block := stream.read(PIECE_BYTES):
            block += stream.readline()
            hashed.update(block)
            pieces.append(Piece(file, start, start + len(block), lines))
            start, lines = start + len(block), lines + block.count(b"\n")
    return pieces, hashed.hexdigest()


def read_rows(piece: Piece) -> Iterator[tuple[int, Any]]:
    """The rows of a piece with their numbers; a line that is no JSON is a ValueError in the row's place.

    Raises:
        ValueError: the file is no JSON array of rows, or no Parquet.
    """
    reader = {".jsonl": _read_lines, ".json": _read_array, ".parquet": _read_groups}[piece.file.suffix]
    yield from reader(piece)


def _read_lines(piece: Piece) -> Iterator[tuple[int, Any]]:
    with piece.file.open("rb") as stream:
        stream.seek(piece.start)
        lines = stream.read(piece.end - piece.start).removeprefix(b"\xef\xbb\xbf" if piece.start == 0 else b"")
    for number, line in enumerate(lines.split(b"\n"), start=piece.first_row):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, ValueError(f"not JSON ({error})")
            except UnicodeDecodeError as error:
                yield number, ValueError(f"not UTF-8 ({error})")


def _read_array(piece: Piece) -> Iterator[tuple[int, Any]]:
    with piece.file.open("rb") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf")
        if not start.lstrip().startswith(b"["):
            raise ValueError(f"{piece.file} must hold a JSON array of rows; with a row on each line, name it .jsonl")
        stream.seek(stream.tell() - len(start))
        try:
            yield from enumerate(ijson.items(stream, "item", use_float=True), start=1)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise ValueError(f"{piece.file} must hold a JSON array of rows, in UTF-8 ({error})") from error


def _row_groups(file: Path) -> list[Piece]:
    try:
        metadata = pq.ParquetFile(file).metadata
    except ArrowInvalid as error:
        raise ValueError(f"{file} is no Parquet file, or damaged ({error}): download it again") from error
    pieces, first = [], 1
    for group in range(metadata.num_row_groups):
        pieces.append(Piece(file, group, group + 1, first))
        first += metadata.row_group(group).num_rows
    return pieces


def _read_groups(piece: Piece) -> Iterator[tuple[int, Any]]:
    try:
        rows = pq.ParquetFile(piece.file).iter_batches(1000, row_groups=[piece.start])
        yield from enumerate((row for batch in rows for row in batch.to_pylist()), start=piece.first_row)
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{piece.file} is damaged ({error}): download it again") from error
