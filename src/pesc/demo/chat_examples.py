"""The demo's chat examples: short instructions and answers, from a package's demo data."""

import json
import re
import tarfile
from pathlib import Path
from random import Random

SOURCE = "data/alpaca_en_demo.json of the source package llamafactory 0.9.5"
LICENCE = "undeclared for the examples (the package is Apache-2.0): used at run time, never redistributed"

_SDIST = "llamafactory-0.9.5.tar.gz"
_SDIST_MEMBER = "llamafactory-0.9.5/data/alpaca_en_demo.json"

_MIN_CHARS, _MAX_CHARS = 80, 900


def find_sdist(cache: Path) -> Path:
    """The source package in the cache folder.

    Raises:
        FileNotFoundError: it is not there; the message gives the command that fetches it.
    """
    sdist = cache / "packages" / _SDIST
    if not sdist.is_file():
        raise FileNotFoundError(
            f"{sdist} is missing, but the chat examples come from it: run `pip install hatchling && pip download "
            f"--no-deps --no-binary :all: --no-build-isolation -d {sdist.parent} llamafactory==0.9.5`"
        )
    return sdist


def draw_chat_examples(cache: Path, seed: int) -> list[tuple[str, str]]:
    """All chat examples of fitting length as prompt and answer, no prompt or answer twice, in the seed's order.

    Raises:
        FileNotFoundError: the source package is not in ``cache``.
        ValueError: the source package lacks the data file.
    """
    sdist = find_sdist(cache)
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(_SDIST_MEMBER)
        if member is None:
            raise ValueError(f"{sdist} has no file {_SDIST_MEMBER}: delete it and download it again")
        raw = json.load(member)
    examples: list[tuple[str, str]] = []
    seen: set[str] = set()
    for item in raw:
        prompt = "\n\n".join(part for part in (item["instruction"].strip(), item["input"].strip()) if part)
        answer = item["output"].strip()
        keys = {_squeeze(prompt), _squeeze(answer)}
        fits = answer and _MIN_CHARS <= len(prompt) + len(answer) <= _MAX_CHARS
        if fits and not _looks_like_code(answer) and not keys & seen:
            seen |= keys
            examples.append((prompt, answer))
    Random(f"{seed}-chat").shuffle(examples)
    return examples


def _squeeze(text: str) -> str:
    return " ".join(text.lower().split())


def _looks_like_code(text: str) -> bool:
    """Code answers among the chat examples would blur the line between the domains."""
    return re.search(r"```|\bdef \w+\(|[;{]\s*\n|</\w+>|#include|\bSELECT\b.*\bFROM\b", text) is not None
