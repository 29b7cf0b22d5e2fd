"""Mixtures: prepared once, kept by content, drawn the same everywhere."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import pesc.data.prepare as prepare
import pesc.data.sources as sources
from checkpoints import tiny_tokenizer, write_pairs, write_rows
from pesc.data.chat import IGNORE_INDEX
from pesc.data.mixture import Mixture, content_hash, prepare_mixture
from pesc.data.settings import DataSettings, SourceSettings


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prepare, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "data"


def mix(seed: int = 0, pairs: bool = False, **settings: Any) -> Mixture:
    console = Console(file=io.StringIO())
    return prepare_mixture(DataSettings(**settings), tiny_tokenizer(), seed, console, pairs=pairs)


def documents(mixture: Mixture) -> list[str]:
    return [tiny_tokenizer().decode(ids) for ids in mixture.examples["input_ids"]]


def test_pieces_and_processes_change_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    alone = mix(train=str(rows))
    assert len(alone.examples) == 40
    monkeypatch.setattr(sources, "PIECE_BYTES", 500)
    rows.write_text(rows.read_text() + "\n")  # an empty line: other bytes, the same rows
    pieces = mix(train=str(rows))
    assert len(list(cache.glob("*/*.arrow"))) > 5
    assert documents(pieces) == documents(alone)
    assert pieces.lengths.tolist() == [len(ids) for ids in alone.examples["input_ids"]]


def test_what_is_prepared_is_found_again_by_content(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = documents(mix(train=str(write_rows(tmp_path / "rows.jsonl"))))
    monkeypatch.setattr(prepare.Encoder, "encode", None)
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    assert documents(mix(train=str(tmp_path / "moved.jsonl"))) == first
    with pytest.raises(TypeError):
        mix(train=str(tmp_path / "moved.jsonl"), max_length=50)


def test_an_interrupted_preparation_goes_on(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 500)
    path = str(write_rows(tmp_path / "rows.jsonl", 40))
    first = documents(mix(train=path))
    made = sorted(cache.glob("*/*.json"))
    made[2].unlink()  # counts are written last: that piece is not complete
    stamps = [file.stat().st_mtime_ns for file in made if file.exists()]
    assert documents(mix(train=path)) == first
    assert [file.stat().st_mtime_ns for file in made if file != made[2]] == stamps


def test_weights_and_rows_are_kept_exactly(tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", 20))

    def drawn(**source: Any) -> Counter[int]:
        mixture = mix(train=[SourceSettings(path=rows, **source)])
        return Counter(mixture.sources[0].rows[mixture.drawn[0]].tolist())

    assert sorted(Counter(drawn(weight=2.25).values()).items()) == [(2, 15), (3, 5)]
    assert len(drawn(weight=0.5)) == 10
    assert len(drawn(rows=7)) == 7
    with pytest.raises(ValueError, match=r"has 20 rows, but 21 are to be drawn"):
        drawn(rows=21)


def test_the_seed_decides_the_draw(tmp_path: Path) -> None:
    train = [
        SourceSettings(path=str(write_rows(tmp_path / "a.jsonl", 20)), rows=5),
        SourceSettings(path=str(write_rows(tmp_path / "b.jsonl", 30)), weight=0.5),
    ]
    assert documents(mix(train=train)) == documents(mix(train=train))
    assert documents(mix(train=train)) != documents(mix(seed=1, train=train))
    # Pinned, so that no machine and no version draws otherwise unnoticed.
    assert [chosen.tolist() for chosen in mix(train=train).drawn] == [
        [1, 2, 8, 10, 18],
        [1, 7, 9, 10, 13, 16, 18, 20, 21, 23, 24, 25, 26, 27, 29],
    ]


@pytest.mark.parametrize(("truncation", "kept"), [("right", slice(40)), ("left", slice(-40, None))])
def test_truncation_keeps_the_end_that_is_asked_for(tmp_path: Path, truncation: str, kept: slice) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", 20))
    complete = {text[kept] for text in _tokens(mix(train=path))}
    mixture = mix(train=path, max_length=40, truncation=truncation)
    assert mixture.lengths.max() == 40
    assert set(_tokens(mixture)) <= complete
    assert mixture.sources[0].counts.truncated > 0
    assert all(labels[0] == IGNORE_INDEX for labels in mixture.examples["labels"])
    dropped = mix(train=path, max_length=40, truncation="drop")
    assert len(dropped.examples) == 20 - dropped.sources[0].counts.truncated


def test_pairs_keep_within_the_length_with_either_answer(tmp_path: Path) -> None:
    path = str(write_pairs(tmp_path / "pairs.jsonl", 20))

    def parts(**settings: Any) -> tuple[list[list[list[int]]], Mixture]:
        mixture = mix(train=path, pairs=True, **settings)
        found = []
        for example in mixture.examples:
            answer = [label for label in example["labels"] if label != IGNORE_INDEX]
            prompt = example["input_ids"][: -len(answer)]
            assert example["input_ids"] == prompt + answer
            assert example["length"] == 2 * len(prompt) + example["trained"]
            assert example["trained"] == len(answer) + len(example["rejected_ids"])
            found.append([prompt, answer, example["rejected_ids"]])
        return found, mixture

    complete, _ = parts()
    assert len(complete) == 20
    for truncation in ("right", "left"):
        cut, mixture = parts(max_length=36, truncation=truncation)
        assert max(len(prompt) + len(answer) for prompt, *answers in cut for answer in answers) == 36
        assert 0 < mixture.sources[0].counts.truncated < 20
        for prompt, *answers in cut:
            if truncation == "right":
                assert any([prompt, *(a[: 36 - len(p)] for a in b)] == [prompt, *answers] for p, *b in complete)
            else:
                assert any(answers == b and p[-len(prompt) :] == prompt for p, *b in complete)
    dropped, mixture = parts(max_length=36, truncation="drop")
    assert len(dropped) == 20 - mixture.sources[0].counts.truncated
    with pytest.raises(ValueError, match="20 of 20 lose their answers"):
        parts(max_length=10)


def test_evaluation_sets_are_kept_out_of_both_answers(tmp_path: Path) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"prompt": "count", "chosen": "one", "rejected": words})
        + "\n"
        + json.dumps({"prompt": "count", "chosen": "one", "rejected": "no"})
    )
    (tmp_path / "cases.json").write_text(json.dumps([{"text": words}]))
    mixture = mix(pairs=True, train=str(tmp_path / "pairs.jsonl"), decontaminate=[str(tmp_path / "cases.json")])
    assert len(mixture.examples) == 1


def _tokens(mixture: Mixture) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in mixture.examples["input_ids"]]


def test_bad_rows_end_the_run_or_are_listed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    path.write_text(path.read_text() + '{"text": 3}\n{\n')
    with pytest.raises(ValueError, match=r"2 of 14 rows are no examples:\n .*rows.jsonl, row 13: .*must be text"):
        mix(train=str(path))
    mixture = mix(train=str(path), on_bad_row="skip")
    assert len(mixture.examples) == 12
    [note] = mixture.notes()
    assert "2 of 14 rows are no examples" in note
    mixture.write_left_out(tmp_path / "left_out.txt")
    assert "rows.jsonl, row 14: not JSON" in (tmp_path / "left_out.txt").read_text()


def test_evaluation_sets_are_kept_out(tmp_path: Path) -> None:
    question = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    rows = [{"prompt": f"{start} {question.upper()}", "completion": "72"} for start in ("Please solve:", "Look,")]
    rows.append({"prompt": "Natalia sold clips to 48 of her friends", "completion": "to whom?"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cases.json").write_text(json.dumps([{"question": question, "answer": "72"}]))
    mixture = mix(train=str(tmp_path / "rows.jsonl"), decontaminate=[str(tmp_path / "cases.json")])
    assert len(mixture.examples) == 1
    [first, _] = mixture.sources[0].counts.contaminated
    assert first == "rows.jsonl, row 1: natalia sold clips to 48 of her friends in april and then she"


def test_the_hash_follows_content_not_names(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    before = content_hash(DataSettings(train=str(path)))
    moved = path.rename(tmp_path / "moved.jsonl")
    assert content_hash(DataSettings(train=str(moved))) == before
    moved.write_text(moved.read_text() + "\n")
    assert content_hash(DataSettings(train=str(moved))) != before
