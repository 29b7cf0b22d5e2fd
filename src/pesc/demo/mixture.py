"""The demo's instruction data: three domains, chat, code and math, from what Python packages carry.

Every source is read at run time and nothing is redistributed. The examples of one seed are always the same, on
one version of Python (the code domain reads the standard library of the interpreter that runs).
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from pesc.demo import chat_examples, code_examples, math_examples
from pesc.storage.files import write_text
from pesc.storage.hub import cache_folder

DOMAINS = ("chat", "code", "math")

SOURCES = {"chat": chat_examples.SOURCE, "code": code_examples.SOURCE, "math": math_examples.SOURCE}

LICENCES = {"chat": chat_examples.LICENCE, "code": code_examples.LICENCE, "math": math_examples.LICENCE}

Conversation = dict[str, Any]


@dataclass(frozen=True)
class MixtureInfo:
    """What :func:`build_mixture` wrote and what it left out."""

    train: Path
    """The JSON Lines file of training examples, shuffled."""
    held_out: Path
    """The JSON Lines file of held-out examples, domain after domain."""
    counts: dict[str, dict[str, int]]
    """Examples by split (``train``, ``held_out``), then by domain."""
    math: math_examples.MathDraw
    """The math examples, with what was passed over."""


def build_mixture(
    out: Path,
    train_per_domain: dict[str, int] | int,
    held_out_per_domain: int,
    seed: int,
    cache: Path | None = None,
) -> MixtureInfo:
    """Write ``out/train.jsonl`` and ``out/held_out.jsonl``, one conversation a line.

    An example is ``{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "domain": ...}``, its domain
    one of :data:`DOMAINS`. No held-out conversation is trained on: chat examples differ in prompt and in answer,
    code examples in the shape of the function's syntax tree, math examples in the instance (not in the template). The
    held-out examples depend on the seed and on their own number only, so they stay the same when more examples are
    trained on.

    Args:
        out: the folder to write to, made if need be.
        train_per_domain: training examples of every domain, or of each by name.
        held_out_per_domain: held-out examples of every domain.
        seed: decides the choice and the order of examples.
        cache: the folder with ``packages/llamafactory-0.9.5.tar.gz``; by default that of ``cache_folder``.

    Raises:
        FileNotFoundError: source packages are missing; the message gives the command for each of them.
        ValueError: a count is negative, a domain unknown or missing, or a domain has too few examples.
    """
    wanted = _wanted(train_per_domain, held_out_per_domain)
    cache = cache_folder(cache)
    _require_sources(cache)
    math = math_examples.draw_math_examples(wanted["math"] + held_out_per_domain, seed)
    drawn = {
        "chat": chat_examples.draw_chat_examples(cache, seed),
        "code": code_examples.draw_code_examples(seed),
        "math": math.examples,
    }
    pools = {domain: [_example(domain, *pair) for pair in pairs] for domain, pairs in drawn.items()}
    splits = _split(pools, wanted, held_out_per_domain)
    Random(f"{seed}-order").shuffle(splits["train"])
    paths = {split: _write(Path(out) / f"{split}.jsonl", examples) for split, examples in splits.items()}
    return MixtureInfo(
        train=paths["train"],
        held_out=paths["held_out"],
        counts={split: {d: sum(e["domain"] == d for e in there) for d in DOMAINS} for split, there in splits.items()},
        math=math,
    )


def _require_sources(cache: Path) -> None:
    """Name everything that is missing at once, before any example is drawn."""
    missing = []
    for find in (partial(chat_examples.find_sdist, cache), math_examples.find_generator, math_examples.find_cases):
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
            raise ValueError(f"examples of {name} ({count}) must be 0 or more")
    return wanted


def _split(
    pools: dict[str, list[Conversation]], wanted: dict[str, int], held_out: int
) -> dict[str, list[Conversation]]:
    """The first ``held_out`` examples of every pool, and the ``wanted`` examples that follow them."""
    splits: dict[str, list[Conversation]] = {"train": [], "held_out": []}
    for domain in DOMAINS:
        examples, end = pools[domain], held_out + wanted[domain]
        if len(examples) < end:
            raise ValueError(
                f"{domain} has {len(examples)} examples, but {wanted[domain]} to train on and {held_out} held out were "
                f"asked for: ask for at most {len(examples)} together"
            )
        splits["held_out"] += examples[:held_out]
        splits["train"] += examples[held_out:end]
    return splits


def _example(domain: str, prompt: str, answer: str) -> Conversation:
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        "domain": domain,
    }


def _write(path: Path, examples: list[Conversation]) -> Path:
    write_text(path, "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
    return path
