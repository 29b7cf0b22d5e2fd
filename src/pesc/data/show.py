"""What a mixture is, for a reader: a table of sources, the lengths, and a few examples."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pesc.data.chat import IGNORE_INDEX
from pesc.data.mixture import Mixture
from pesc.data.prepare import column

_MEASURES = (
    "format",
    "rows",
    "that are no examples",
    "that share words with an evaluation set",
    "examples longer than max_length",
    "examples that lose their answers so",
    "examples drawn",
    "tokens",
    "tokens trained on",
    "share of all tokens",
)
_EXAMPLES, _EXAMPLE_TOKENS, _BARS, _BAR_WIDTH = 3, 400, 12, 50


def show_mixture(mixture: Mixture, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print a mixture: its sources, the lengths of its examples, and the first of them with trained tokens coloured."""
    console.print(_sources(mixture))
    for name, source in mixture.held_out.items():
        examples, tokens = len(source.examples), column(source.examples, "trained").sum()
        console.print(Text(f"Held out: {name}, {examples:,} examples with {tokens:,} tokens to score"))
    console.print(_lengths(mixture))
    colours = "what is trained on is green"
    if "rejected_ids" in mixture.examples.column_names:
        colours = "the chosen answer is green, the rejected one red"
    for index in range(min(_EXAMPLES, len(mixture.examples))):
        console.print(Text(f"\nExample {index + 1}; {colours}", style="bold"))
        console.print(_example(mixture, index, tokenizer))


def _sources(mixture: Mixture) -> Table:
    table = Table("", title="Sources")
    columns: list[list[str]] = []
    tokens = [column(source.examples, "length")[drawn].sum() for source, drawn in _parts(mixture)]
    for (source, drawn), size in zip(_parts(mixture), tokens, strict=True):
        counts, trained = source.counts, column(source.examples, "trained")[drawn].sum()
        table.add_column(Text(source.settings.path), justify="right", overflow="fold")
        numbers = [counts.rows, len(counts.faults), len(counts.contaminated), counts.truncated, counts.dropped]
        numbers += [len(drawn), size, trained]
        columns.append([", ".join(counts.formats), *(f"{n:,}" for n in numbers), f"{size / sum(tokens):.1%}"])
    for name, *cells in zip(_MEASURES, *columns, strict=True):
        table.add_row(name, *cells)
    return table


def _parts(mixture: Mixture) -> list[tuple]:
    return list(zip(mixture.sources, mixture.drawn, strict=True))


def _lengths(mixture: Mixture) -> Table:
    lengths = mixture.lengths
    counts, edges = np.histogram(lengths, bins=min(_BARS, int(np.ptp(lengths)) + 1))
    table = Table(title=f"Lengths of {len(lengths):,} rows in tokens; mean {lengths.mean():.0f}", box=None)
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "\u2588" * round(_BAR_WIDTH * count / counts.max())
        table.add_row(f"{np.ceil(low):.0f} to {np.floor(high):.0f}", f"{count:,}", bar)
    return table


def _example(mixture: Mixture, index: int, tokenizer: PreTrainedTokenizerBase) -> Text:
    example, text = mixture.examples[index], Text()
    pairs = zip(example["input_ids"][:_EXAMPLE_TOKENS], example["labels"], strict=False)
    runs: list[tuple[bool, list[int]]] = []
    for token, label in pairs:
        trained = label != IGNORE_INDEX
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    for trained, tokens in runs:  # a run at once: a character may be several tokens
        text.append(tokenizer.decode(tokens), style="green" if trained else "dim")
    if len(example["input_ids"]) > _EXAMPLE_TOKENS:
        text.append(" \u2026", style="dim")
    if "rejected_ids" in example:
        text.append("\n" + tokenizer.decode(example["rejected_ids"][:_EXAMPLE_TOKENS]), style="red")
    return text
