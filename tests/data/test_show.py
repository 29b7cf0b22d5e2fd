"""What is shown of a mixture is what it is."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from checkpoints import tiny_tokenizer, write_pairs, write_rows
from pesc.data.mixture import prepare_mixture
from pesc.data.settings import DataSettings, SourceSettings
from pesc.data.show import show_mixture


def test_the_table_the_lengths_and_the_coloured_tokens(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "abc"}\n{"text": 3}\n')
    data = DataSettings(
        train=[
            SourceSettings(path=str(write_rows(tmp_path / "rows.jsonl")), weight=2.0),
            SourceSettings(path=str(tmp_path / "text.jsonl")),
        ],
        eval=str(write_rows(tmp_path / "held.jsonl", 4)),
        on_bad_row="skip",
    )
    console = Console(file=io.StringIO(), width=200, record=True)
    mixture = prepare_mixture(data, tiny_tokenizer(), 0, console)
    show_mixture(mixture, tiny_tokenizer(), console)
    page = console.export_html(clear=False)
    shown = console.export_text()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    cells = [list(cells) for cells in zip(*lines, strict=True)][1:]
    rows = sum(len(ids) for ids in mixture.sources[0].examples["input_ids"])
    assert cells[0][:8] == ["messages", "12", "0", "0", "0", "0", "24", f"{2 * rows:,}"]
    assert cells[1] == ["text", "2", "1", "0", "0", "0", "1", "4", "3", f"{4 / (2 * rows + 4):.1%}"]
    bars = [line.split() for line in shown.splitlines() if "█" in line]
    assert sum(int(bar[3]) for bar in bars) == 25
    assert "<|im_start|>user\ncount to" in shown
    assert re.search(r"Held out: held, 4 examples with \d+ tokens to score", shown)
    assert "color: #008000" in page


def test_both_answers_of_a_pair_are_shown(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, record=True)
    data = DataSettings(train=str(write_pairs(tmp_path / "pairs.jsonl", 1)))
    show_mixture(prepare_mixture(data, tiny_tokenizer(), 0, console, pairs=True), tiny_tokenizer(), console)
    assert "the chosen answer is green, the rejected one red" in console.export_text(clear=False)
    page = console.export_html(inline_styles=True)
    assert re.search("color: #008000[^>]*>1&lt;", page)
    assert re.search("color: #800000[^>]*>no&lt;", page)
