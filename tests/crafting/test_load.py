"""Models by name: what is there loads, what is not is said plainly."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import tiny_dense
from pesc.crafting.load import load, load_tokenizer, locate
from pesc.crafting.sources import resolve


def test_folders_load_and_remember_their_name(tmp_path: Path) -> None:
    folder = tiny_dense(tmp_path / "dense")
    assert resolve(folder) == folder
    assert load(folder).config.name_or_path == str(folder)
    assert load_tokenizer(folder).pad_token == "<|pad|>"


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such/model", "./x/y/z"])
def test_what_is_not_there_is_named_with_the_way_out(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder.*give a folder with a config.json"):
        resolve(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(FileNotFoundError, match="is a file: give the model's folder"):
        resolve(tmp_path / "model.gguf")


def test_an_empty_folder_and_a_broken_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        locate(tmp_path)


def test_missing_and_truncated_weights(tmp_path: Path) -> None:
    folder = tiny_dense(tmp_path / "dense")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=str(folder)):
        load(folder)
