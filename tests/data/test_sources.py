"""Files of rows, read in pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pesc.data.sources as sources
from pesc.data.sources import cut, data_files, read_rows

ROWS = [{"text": f"row {number} é", "n": number} for number in range(40)]


def write(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


@pytest.mark.parametrize("suffix", sources.SUFFIXES)
def test_pieces_give_each_row_once_with_its_number(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    pieces, _ = cut(write(tmp_path / f"data{suffix}"))
    assert len(pieces) > 3 or suffix == ".json"
    assert [row for piece in pieces for row in read_rows(piece)] == list(enumerate(ROWS, start=1))


def test_marks_and_line_ends_of_other_systems(tmp_path: Path) -> None:
    line = json.dumps(ROWS[0])
    for name, text in (("a.jsonl", f"{line}\r\n\r\n{line}"), ("b.json", f"[{line}]")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    read = [row for file in data_files(str(tmp_path)) for piece in cut(file)[0] for row in read_rows(piece)]
    assert read == [(1, ROWS[0]), (3, ROWS[0]), (1, ROWS[0])]


def test_a_line_that_is_no_json_stands_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"n": 1}\n{\n"\xff"\n')
    [piece] = cut(path)[0]
    (_, first), (two, broken), (three, latin) = read_rows(piece)
    assert first == {"n": 1}
    assert (two, three) == (2, 3)
    assert "not JSON" in str(broken) and "not UTF-8" in str(latin)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b'{"a": 1}', "must hold a JSON array of rows; with a row on each line, name it .jsonl"),
        ("d.json", b"[1, ", "must hold a JSON array of rows"),
        ("d.parquet", b"PAR1", "is no Parquet file"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        for piece in cut(tmp_path / name)[0]:
            list(read_rows(piece))


def test_paths_that_mean_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for path, message in [("a.txt", "must end in"), ("b.jsonl", "no such data file"), (".", "holds no file")]:
        with pytest.raises(FileNotFoundError, match=message):
            data_files(str(tmp_path / path))
    with pytest.raises(FileNotFoundError, match=r"hub did not provide it .*a dataset's hub id"):
        data_files("org/name")
