"""A source's rows as tokens on disk: encoded once, by all cores, and kept by content."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from pesc.data.chat import IGNORE_INDEX, encode_conversation, encode_pair
from pesc.data.decontaminate import Decontaminator
from pesc.data.formats import conversation, detect, refuse_faults, rejected_conversation
from pesc.data.settings import DataSettings, SourceSettings
from pesc.data.sources import Piece, cut, data_files, read_rows
from pesc.machine.progress import Progress
from pesc.storage.files import json_sha256, new_file, read_json, write_json
from pesc.storage.hub import cache_folder
from pesc.storage.lock import locked

_BATCH = 1000
"""Examples in memory at once."""
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema({"input_ids": _IDS, "labels": _IDS, "length": pa.int32(), "trained": pa.int32(), "row": pa.int64()})


@dataclass
class Counts:
    """What became of rows."""

    rows: int = 0
    split: int = 0
    """Conversations that became an example for each assistant turn, as the chat template rewrites earlier turns."""
    truncated: int = 0
    """Examples longer than the maximal length; with truncation "drop" they are left out."""
    dropped: int = 0
    """Examples without a token to train on within the maximal length."""
    faults: list[str] = field(default_factory=list)
    """Rows that are no examples: file, row, reason."""
    contaminated: list[str] = field(default_factory=list)
    """Rows that share words with an evaluation set: file, row, words."""
    formats: dict[str, int] = field(default_factory=dict)
    """Rows of each format."""

    def add(self, other: Counts) -> None:
        """Count another piece's rows too."""
        for name, value in vars(other).items():
            if name == "formats":
                self.formats |= {key: self.formats.get(key, 0) + count for key, count in value.items()}
            else:
                setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Encoder:
    """Makes examples of rows; the same in every process."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation: str
    decontaminator: Decontaminator | None
    format: str | None
    schema: ClassVar = _SCHEMA

    def encode(self, piece: Piece, counts: Counts) -> Iterator[dict[str, Any]]:
        """The examples of a piece, counted."""
        for number, row in read_rows(piece):
            counts.rows += 1
            place = f"{piece.file.name}, row {number}"
            try:
                name, read, encoded = self._read(row)
            except ValueError as error:
                counts.faults.append(f"{place}: {error}")
                continue
            counts.formats[name] = counts.formats.get(name, 0) + 1
            if self.decontaminator and (words := self.decontaminator.find(read)):
                counts.contaminated.append(f"{place}: {words}")
                continue
            counts.split += len(encoded) > 1
            for tokens in encoded:
                if example := self._fit(tokens, counts):
                    yield example | {"row": counts.rows - 1}

    def write(self, piece: Piece, file: Path) -> Path:
        """Encode a piece into an Arrow file, and its counts beside it."""
        counts = Counts()
        file.unlink(missing_ok=True)  # without counts, it is what an interruption left
        with new_file(file) as partial, pa.ipc.new_stream(partial, self.schema) as stream:
            examples = self.encode(piece, counts)
            while batch := list(itertools.islice(examples, _BATCH)):
                stream.write_batch(pa.RecordBatch.from_pylist(batch, self.schema))
        write_json(_counts_of(file), asdict(counts))
        return file

    def _read(self, row: Any) -> tuple[str, Any, list[Any]]:
        """The name of a row's format, its texts, and the tokens of its examples, as `_fit` takes them."""
        name = self.format or detect(row).name
        read = conversation(row, name)
        return name, read, encode_conversation(read, self.tokenizer)

    def _fit(self, tokens: Any, counts: Counts) -> dict[str, Any] | None:
        """An example, cut to the maximal length; None if nothing is left to train on."""
        input_ids, labels = tokens
        if len(input_ids) > self.max_length:
            counts.truncated += 1
            if self.truncation == "drop":
                return None
            kept = slice(-self.max_length, None) if self.truncation == "left" else slice(self.max_length)
            input_ids, labels = input_ids[kept], labels[kept]
        labels = [IGNORE_INDEX, *labels[1:]]  # nothing comes before the first token
        trained = len(labels) - labels.count(IGNORE_INDEX)
        if not trained:
            counts.dropped += 1
            return None
        return {"input_ids": input_ids, "labels": labels, "length": len(input_ids), "trained": trained}


class PairEncoder(Encoder):
    """Makes an example of each preference pair.

    It is the conversation with the chosen answer, which alone is trained on; `rejected_ids` holds the other answer's
    tokens. `length` and `trained` count both conversations.
    """

    schema: ClassVar = _SCHEMA.append(pa.field("rejected_ids", _IDS))

    def _read(self, row: Any) -> tuple[str, Any, list[Any]]:
        chosen = conversation(row, "preference")
        rejected = rejected_conversation(row)
        return "preference", [chosen, rejected], [encode_pair(chosen, rejected, self.tokenizer)]

    def _fit(self, tokens: Any, counts: Counts) -> dict[str, Any] | None:
        prompt, chosen, rejected = tokens
        excess = len(prompt) + max(len(chosen), len(rejected)) - self.max_length
        if excess > 0:
            counts.truncated += 1
            if self.truncation == "drop":
                return None
            room = max(0, self.max_length - len(prompt))
            if self.truncation == "left":
                prompt = prompt[excess:]
            else:
                chosen, rejected = chosen[:room], rejected[:room]
        if not (prompt and chosen and rejected):
            counts.dropped += 1
            return None
        trained = len(chosen) + len(rejected)
        return {
            "input_ids": prompt + chosen,
            "labels": [IGNORE_INDEX] * len(prompt) + chosen,
            "rejected_ids": rejected,
            "length": 2 * len(prompt) + trained,
            "trained": trained,
        }


@dataclass(frozen=True)
class PreparedSource:
    """A source's examples, mapped from disk."""

    settings: SourceSettings
    examples: datasets.Dataset
    """Columns `input_ids`, `labels`, `length` and `trained`, the number of tokens that are trained on."""
    rows: np.ndarray
    """[examples] int64: the row of each, counted from 0 over the source's files."""
    counts: Counts
    digest: str
    """Of what its files hold."""


def prepare_source(source: SourceSettings, data: DataSettings, encoder: Encoder, console: Console) -> PreparedSource:
    """Encode a source, or map what was encoded before.

    The files lie in the cache's folder data/, under a hash of all that decides them: contents, settings, tokenizer,
    chat template, libraries. What an interrupted preparation has finished is used by the next.

    Args:
        source: what to read.
        data: what to do with rows that are no examples.
        encoder: of the source's format.
        console: where progress is shown.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: rows that are no examples, unless they are to be skipped; or a source without rows.
        OSError: a process of the preparation was killed, or the disk is full.
    """
    pieces, digest = cut_source(source)
    folder = cache_folder() / "data" / _key(encoder, digest)
    files = [folder / f"{number:05}.arrow" for number in range(len(pieces))]
    tables, rows, total = [], [], Counts()
    progress = Progress(console, f"  preparing {source.path}", len(pieces), transient=True)
    with locked(folder, wait=True), progress:  # another process may prepare the same
        for done, (file, counts) in enumerate(_encode_missing(encoder, pieces, files), start=1):
            if counts.faults and data.on_bad_row == "error":
                refuse_faults(counts.faults, counts.rows, source.path)
            tables.append(datasets.Dataset.from_file(str(file)))
            rows.append(np.asarray(tables[-1].data.column("row"), dtype=np.int64) + total.rows)
            total.add(counts)
            progress.update(done)
    refuse_faults([], total.rows, source.path)
    examples = datasets.concatenate_datasets(tables).remove_columns("row")
    return PreparedSource(source, examples, np.concatenate(rows), total, digest)


def cut_source(source: SourceSettings) -> tuple[list[Piece], str]:
    """The pieces of a source's files, and the SHA-256 of what the files hold.

    Raises:
        FileNotFoundError: there is no such source.
    """
    cuts = [cut(file) for file in data_files(source.path)]
    return [piece for pieces, _ in cuts for piece in pieces], json_sha256([sha256 for _, sha256 in cuts])


def column(examples: datasets.Dataset, name: str) -> np.ndarray:
    """[examples] int64: a column of numbers."""
    return np.asarray(examples.with_format("numpy")[name][:], dtype=np.int64)


def _key(encoder: Encoder, digest: str) -> str:
    tokenizer = encoder.tokenizer
    cleaner = encoder.decontaminator and encoder.decontaminator.digest()
    libraries = [metadata.version(name) for name in ("pesc-moe", "transformers", "tokenizers")]
    made_by = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map, libraries]
    kind = type(encoder).__name__
    return json_sha256([kind, digest, encoder.max_length, encoder.truncation, encoder.format, cleaner, made_by])[:32]


def _encode_missing(encoder: Encoder, pieces: list[Piece], files: list[Path]) -> Iterator[tuple[Path, Counts]]:
    """Each piece's file and counts in order; those that are not there are made, by as many processes as pay."""
    missing = [(piece, file) for piece, file in zip(pieces, files, strict=True) if not _counts_of(file).is_file()]
    if len(missing) < 2:
        yield from _in_order(files, (encoder.write(piece, file) for piece, file in missing))
        return
    workers = min(len(missing), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(encoder,)) as pool:
        try:
            yield from _in_order(files, pool.map(_write, *zip(*missing, strict=True)))
        except BrokenProcessPool as error:
            raise OSError("a process that prepared data was killed, perhaps for lack of memory: try again") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(files: list[Path], made: Iterator[Path]) -> Iterator[tuple[Path, Counts]]:
    for file in files:
        while not _counts_of(file).is_file():
            next(made)
        yield file, Counts(**read_json(_counts_of(file)))


def _counts_of(file: Path) -> Path:
    """Written last: where it is, the piece is complete."""
    return file.with_suffix(".json")


_encoder: Encoder


def _start(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already
    _encoder = encoder


def _write(piece: Piece, file: Path) -> Path:
    return _encoder.write(piece, file)
