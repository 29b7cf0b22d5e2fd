"""The demo's instruction data: three domains, chat, code and math, from what Python packages carry.

Every source is read at run time and nothing is redistributed. The rows of one seed are always the same, on
one version of Python (the code domain reads the standard library of the interpreter that runs).
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from pesc.demo import chat_rows, code_rows, math_rows
from pesc.storage.hub import cache_folder

DOMAINS = ("chat", "code", "math")

SOURCES = {"chat": chat_rows.SOURCE, "code": code_rows.SOURCE, "math": math_rows.SOURCE}

LICENCES = {"chat": chat_rows.LICENCE, "code": code_rows.LICENCE, "math": math_rows.LICENCE}

Row = dict[str, Any]


@dataclass(frozen=True)
class MixtureInfo:
    """What :func:`build_mixture` wrote and what it left out."""

    train: Path
    """The JSON Lines file of training rows, shuffled."""
    held_out: Path
    """The JSON Lines file of held-out rows, domain after domain."""
    counts: dict[str, dict[str, int]]
    """Rows by split (``train``, ``held_out``), then by domain."""
    available: dict[str, int]
    """Distinct rows of the domains that run out (chat, code), both splits together."""
    contaminated_templates: dict[int, tuple[str, float]]
    """Math templates left out: template number to the GSM8K case it rewords and their overlap, 0 to 1."""
    contaminated_rows: int
    """Math rows passed over because their template is contaminated."""
    unsound_rows: int
    """Math rows passed over because their worked answer holds a wrong equation or an unrounded fraction."""
    sources: dict[str, str] = field(default_factory=lambda: dict(SOURCES))
    licences: dict[str, str] = field(default_factory=lambda: dict(LICENCES))


def build_mixture(
    out: Path,
    train_per_domain: dict[str, int] | int,
    held_out_per_domain: int,
    seed: int,
    cache: Path | None = None,
) -> MixtureInfo:
    """Write ``out/train.jsonl`` and ``out/held_out.jsonl``, one conversation a line.

    A row is ``{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "domain": ...}``, its domain
    one of :data:`DOMAINS`. No held-out conversation is trained on: chat rows differ in prompt and in answer,
    code rows in the shape of the function's syntax tree, math rows in the instance (not in the template). The
    held-out rows depend on the seed and on their own number only, so they stay the same when more rows are
    trained on.

    Args:
        out: the folder to write to, made if need be.
        train_per_domain: training rows of every domain, or of each by name.
        held_out_per_domain: held-out rows of every domain.
        seed: decides the choice and the order of rows.
        cache: the folder with ``packages/llamafactory-0.9.5.tar.gz``; by default that of ``cache_folder``.

    Raises:
        FileNotFoundError: source packages are missing; the message gives the command for each of them.
        ValueError: a count is negative, a domain unknown or missing, or a domain has too few rows.
    """
    wanted = _wanted(train_per_domain, held_out_per_domain)
    cache = cache_folder(cache)
    _require_sources(cache)
    math = math_rows.draw_math_rows(wanted["math"] + held_out_per_domain, seed)
    drawn = {
        "chat": chat_rows.draw_chat_rows(cache, seed),
        "code": code_rows.draw_code_rows(seed),
        "math": math.rows,
    }
    pools = {domain: [_row(domain, *pair) for pair in pairs] for domain, pairs in drawn.items()}
    splits = _split(pools, wanted, held_out_per_domain)
    Random(f"{seed}-order").shuffle(splits["train"])
    paths = {split: _write(Path(out) / f"{split}.jsonl", rows) for split, rows in splits.items()}
    return MixtureInfo(
        train=paths["train"],
        held_out=paths["held_out"],
        counts={split: {d: sum(r["domain"] == d for r in rows) for d in DOMAINS} for split, rows in splits.items()},
        available={domain: len(pools[domain]) for domain in ("chat", "code")},
        contaminated_templates=math.contaminated,
        contaminated_rows=math.contaminated_rows,
        unsound_rows=math.unsound_rows,
    )


def _require_sources(cache: Path) -> None:
    """Name everything that is missing at once, before any row is drawn."""
    missing = []
    for find in (partial(chat_rows.find_sdist, cache), math_rows.find_generator, math_rows.find_cases):
        try:
            find()
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("\n".join(missing))


def _wanted(train_per_domain: dict[str, int] | int, held_out_per_domain: int) -> dict[str, int]:
    wanted = dict.fromkeys(DOMAINS, train_per_domain) if isinstance(train_per_domain, int) else dict(train_per_domain)
    if set(wanted) != set(DOMAINS):
        raise ValueError(f"train_per_domain names {sorted(wanted)}, but must name exactly {list(DOMAINS)}")
    for name, count in {**wanted, "held_out_per_domain": held_out_per_domain}.items():
        if count < 0:
            raise ValueError(f"rows of {name} ({count}) must be 0 or more")
    return wanted


def _split(pools: dict[str, list[Row]], wanted: dict[str, int], held_out: int) -> dict[str, list[Row]]:
    """The first ``held_out`` rows of every pool, and the ``wanted`` rows that follow them."""
    splits: dict[str, list[Row]] = {"train": [], "held_out": []}
    for domain in DOMAINS:
        rows, end = pools[domain], held_out + wanted[domain]
        if len(rows) < end:
            raise ValueError(
                f"{domain} has {len(rows)} rows, but {wanted[domain]} training and {held_out} held-out rows "
                f"were asked for: ask for at most {len(rows)} together"
            )
        splits["held_out"] += rows[:held_out]
        splits["train"] += rows[held_out:end]
    return splits


def _row(domain: str, prompt: str, answer: str) -> Row:
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        "domain": domain,
    }


def _write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
