"""Keeps evaluation sets out of training data, by runs of words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

from pesc.data.sources import cut, data_files, read_rows

RUN = 13
"""Words in a row that tell (the length of GPT-3's filter, arXiv 2005.14165, and of lm-eval's)."""
_SHORTEST = 8
_ON_THE_HUB = {"humaneval": "openai/openai_humaneval", "gsm8k": "openai/gsm8k"}


class Decontaminator:
    """Knows the runs of words of evaluation sets; texts shorter than a run are one themselves."""

    def __init__(self, names: list[str]) -> None:
        """
        Args:
            names: humaneval, gsm8k, or paths as of a source.

        Raises:
            FileNotFoundError, ValueError: as `data_files` and `read_rows` do.
        """
        self._runs: dict[int, set[tuple[str, ...]]] = {}
        for name in names:
            for file in data_files(_ON_THE_HUB.get(name, name)):
                for piece in cut(file)[0]:
                    for _, row in read_rows(piece):
                        for text in texts(row):
                            self._learn(text)

    def _learn(self, text: str) -> None:
        words = _words(text)
        if len(words) >= _SHORTEST:
            size = min(len(words), RUN)
            self._runs.setdefault(size, set()).update(_runs(words, size))

    def digest(self) -> str:
        """Of all runs it knows."""
        runs = sorted(" ".join(run) for known in self._runs.values() for run in known)
        return hashlib.sha256("\n".join(runs).encode()).hexdigest()

    def find(self, conversation: Any) -> str | None:
        """A run of words that a conversation shares with the sets, or None."""
        for text in texts(conversation):
            words = _words(text)
            for size, known in self._runs.items():
                if found := next((run for run in _runs(words, size) if run in known), None):
                    return " ".join(found)
        return None


def texts(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)), strict=False)
