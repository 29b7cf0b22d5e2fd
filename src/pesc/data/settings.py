"""Settings of training data: a recipe's `data` section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pesc.rules import Settings, above, at_least

FormatName = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "preference", "camelidae", "text"]


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Settings):
    """One source of a mixture."""

    path: str
    """A JSON, JSONL or Parquet file, a folder of them, or the hub id of a dataset."""
    format: FormatName | None = None
    """How its rows are written; null means that the columns of each row tell."""
    weight: Annotated[float, above(0)] = 1.0
    """Passes over it in an epoch: 0.5 draws half of its rows, 2 takes each row twice."""
    rows: Annotated[int | None, at_least(1)] = None
    """Rows drawn from it; overrides weight."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """What the model is trained on."""

    train: str | list[SourceSettings]
    """A file, folder or hub id, as a source's path; or a list of sources."""
    eval: str | list[SourceSettings] | None = None
    """Held-out data, written as train is; its loss is measured every training.eval_steps. It is never packed."""
    max_length: Annotated[int, at_least(2)] = 2048
    """Tokens of an example."""
    truncation: Literal["right", "left", "drop"] = "right"
    """What becomes of a longer example: its right or its left end is cut off, or it is left out. All are counted."""
    chat_template: str | None = None
    """chatml, camelidae (the authors' form), or a .jinja file; null means the tokenizer's own."""
    packing: bool = False
    """Put several examples into one row of max_length tokens; none attends to another."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that is no example does: end the run, or be left out and counted."""
    decontaminate: list[str] | None = None
    """Evaluation sets to keep out: humaneval, gsm8k, or paths as a source's. Rows that share 13 words in a row go."""

    @property
    def sources(self) -> list[SourceSettings]:
        """The mixture's sources."""
        return _sources(self.train)

    @property
    def held_out(self) -> list[SourceSettings]:
        """The held-out sources."""
        return _sources(self.eval or [])

    @staticmethod
    def conflicts(values: dict[str, Any]) -> Iterator[str]:
        if values.get("packing") and values.get("truncation") == "left":
            yield "truncation (left) must be right or drop with packing"


def _sources(given: str | list[SourceSettings]) -> list[SourceSettings]:
    return [SourceSettings(path=given)] if isinstance(given, str) else given
