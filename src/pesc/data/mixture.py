"""A mixture: so much of each source, drawn by the seed, the same on every machine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from pesc.data.decontaminate import Decontaminator
from pesc.data.prepare import Encoder, PairEncoder, PreparedSource, column, cut_source, prepare_source
from pesc.data.settings import DataSettings, SourceSettings
from pesc.storage.files import json_sha256, write_text

LEFT_OUT = "left_out.txt"


@dataclass(frozen=True)
class Mixture:
    """The examples of one epoch."""

    examples: datasets.Dataset
    """Columns `input_ids`, `labels` and `length`, among others; packed, each holds several documents, and
    `seq_lengths`; pairs have `rejected_ids`."""
    sources: list[PreparedSource]
    drawn: list[np.ndarray]
    """Of each source, the indices of its examples that are in the mixture, with repeats."""
    held_out: dict[str, PreparedSource]
    """What is evaluated on while training, by name."""

    @property
    def lengths(self) -> np.ndarray:
        """[examples], in tokens."""
        return column(self.examples, "length")

    @property
    def digest(self) -> str:
        """`content_hash` of the data that were encoded."""
        return json_sha256([source.digest for source in [*self.sources, *self.held_out.values()]])

    def notes(self) -> list[str]:
        """Sentences on what did not become an example as it was."""
        return [note for source in [*self.sources, *self.held_out.values()] for note in _notes(source)]

    def rows_of(self, indices: Sequence[int], limit: int = 20) -> str:
        """The rows that some examples were made of, in words; `limit` rows at most.

        They are found by their tokens, since packing keeps no more of them.
        """
        found: dict[str, list[str]] = {}
        documents = [document for index in indices for document in _documents(self.examples[index])]
        for length, document in documents[:limit]:
            name, row = self._origin(length, document)
            found.setdefault(name, []).append(str(row))
        more = f", and {len(documents) - limit} more rows" if len(documents) > limit else ""
        return "; ".join(f"{name}, row {', '.join(rows)}" for name, rows in found.items()) + more

    def _origin(self, length: int, document: list[int]) -> tuple[str, int]:
        """Path of a source, and the number of a row in it, counted from 1."""
        for source in self.sources:
            for at in (column(source.examples, "length") == length).nonzero()[0].tolist():
                if source.examples[at]["input_ids"] == document:
                    return source.settings.path, int(source.rows[at]) + 1
        raise AssertionError("an example that no source holds")

    def write_left_out(self, path: Path) -> None:
        """List the rows that are no examples, and those that share words with an evaluation set."""
        found = [(s.settings.path, s.counts) for s in [*self.sources, *self.held_out.values()]]
        lines = [f"{name}: {line}" for name, counts in found for line in [*counts.faults, *counts.contaminated]]
        write_text(path, "".join(f"{line}\n" for line in lines))


def prepare_mixture(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int, console: Console, *, pairs: bool = False
) -> Mixture:
    """Encode every source, or map what was encoded before, and draw the mixture.

    Args:
        data: the recipe's section.
        tokenizer: with the chat template to use.
        seed: decides which rows are drawn, and their order.
        console: where progress is shown.
        pairs: each row is to be an example of two answers, chosen and rejected.

    Raises:
        FileNotFoundError, ValueError, OSError: as `prepare_source` does.
        ValueError: more rows are asked for than a source has, nothing is left to train or to evaluate on, or held-out
            data are trained on.
    """
    cleaner = Decontaminator(data.decontaminate) if data.decontaminate else None

    def prepare(settings: SourceSettings, cleaner: Decontaminator | None) -> PreparedSource:
        kind = PairEncoder if pairs else Encoder
        encoder = kind(tokenizer, data.max_length, data.truncation, cleaner, settings.format)
        return prepare_source(settings, data, encoder, console)

    sources = [prepare(source, cleaner) for source in data.sources]
    held_out = [prepare(source, None) for source in data.held_out]
    _refuse_trained(sources, held_out)
    drawn = [_draw(source, f"{seed}, source {number}") for number, source in enumerate(sources)]
    if not sum(map(len, drawn)):
        lost, rows = (sum(getattr(source.counts, name) for source in sources) for name in ("dropped", "rows"))
        raise ValueError(
            f"data.train has no example with anything to train on within {data.max_length} tokens: {lost} of {rows} "
            "lose their answers; raise data.max_length"
        )
    starts = np.cumsum([0, *(len(source.examples) for source in sources)])
    order = np.concatenate([start + chosen for start, chosen in zip(starts, drawn, strict=False)]).tolist()
    random.Random(f"order {seed}").shuffle(order)
    examples = datasets.concatenate_datasets([source.examples for source in sources]).select(order)
    if data.packing:
        examples = _pack(examples, data.max_length)
    return Mixture(examples, sources, drawn, _named([_drawn(source, seed) for source in held_out]))


def content_hash(data: DataSettings) -> str:
    """Of the bytes of every source's files, held-out ones included.

    Raises:
        FileNotFoundError: a source is not there.
    """
    return json_sha256([cut_source(source)[1] for source in [*data.sources, *data.held_out]])


def _refuse_trained(sources: list[PreparedSource], held_out: list[PreparedSource]) -> None:
    digests = {source.digest for source in sources}
    if both := [source.settings.path for source in held_out if source.digest in digests]:
        raise ValueError(f"data.eval: {', '.join(both)} holds what data.train trains on: keep rows apart for it")


def _drawn(source: PreparedSource, seed: int) -> PreparedSource:
    """A held-out source with those of its examples that are drawn."""
    chosen = _draw(source, f"{seed}, held out")
    if not len(chosen):
        raise ValueError(f"data.eval: {source.settings.path} has no example with an answer within data.max_length")
    return replace(source, examples=source.examples.select(chosen), rows=source.rows[chosen])


def _named(sources: list[PreparedSource]) -> dict[str, PreparedSource]:
    """By the names of their files or folders, or by their paths if several have one name."""
    paths = [source.settings.path for source in sources]
    stems = [Path(path).stem for path in paths]
    return dict(zip(stems if len({*stems}) == len(stems) else paths, sources, strict=True))


def _notes(source: PreparedSource) -> Iterator[str]:
    counts, name = source.counts, source.settings.path
    if counts.split:
        yield (
            f"{name}: {counts.split} of {counts.rows} conversations became an example for each answer, since the chat "
            "template rewrites earlier turns"
        )
    if counts.truncated or counts.dropped:
        yield (
            f"{name}: {counts.truncated} examples are longer than data.max_length; {counts.dropped} have nothing to "
            "train on within it, and are left out"
        )
    if counts.faults or counts.contaminated:
        yield (
            f"{name}: {len(counts.faults)} of {counts.rows} rows are no examples, {len(counts.contaminated)} share "
            f"words with an evaluation set; they are left out, and listed in {LEFT_OUT}"
        )


def _documents(example: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """`length` and tokens of an example, or of each document of a packed one."""
    ids = example["input_ids"]
    if "seq_lengths" not in example:
        return [(example["length"], ids)]
    ends = list(itertools.accumulate(example["seq_lengths"]))
    return [(end - start, ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _draw(source: PreparedSource, seed: str) -> np.ndarray:
    """Indices of the examples of the rows that are drawn."""
    rows, settings = source.counts.rows, source.settings
    if settings.rows is not None and settings.rows > rows:
        raise ValueError(f"{settings.path} has {rows} rows, but {settings.rows} are to be drawn: ask for fewer")
    wanted = round(settings.weight * rows) if settings.rows is None else settings.rows
    complete, rest = divmod(wanted, rows)
    chosen = np.isin(source.rows, random.Random(seed).sample(range(rows), rest)).nonzero()[0]
    return np.concatenate([*[np.arange(len(source.rows))] * complete, chosen])


def _pack(examples: datasets.Dataset, max_length: int) -> datasets.Dataset:
    packed = pack_dataset(examples.select_columns(["input_ids", "labels"]), max_length)
    return packed.map(lambda rows: {"length": [sum(each) for each in rows["seq_lengths"]]}, batched=True)
