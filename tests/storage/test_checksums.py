"""SHA256SUMS: a changed byte is noticed, `sha256sum` reads the same file, and no stale one is left."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import pesc
from checkpoints import tiny_dense
from pesc import PescConfig, craft_checkpoint
from pesc.storage.checksums import SUMS, check_checksums, write_checksums

CONFIG = PescConfig(num_experts=4, adapter_dim=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "LICENSE").write_text("terms")
    (tmp_path / "b with spaces.txt").write_bytes(bytes(100))
    (tmp_path / "README.md").write_text("a card")
    write_checksums(tmp_path)
    return tmp_path


def test_what_was_written_is_sound_though_a_card_was_edited_or_a_licence_left_out(folder: Path) -> None:
    (folder / "README.md").write_text("another")
    (folder / "LICENSE").unlink()  # as in a download
    assert check_checksums(folder)
    (folder / SUMS).unlink()
    assert not check_checksums(folder)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_it(folder: Path) -> None:
    assert subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=folder, capture_output=True).returncode == 0


def test_changed_missing_and_added_files_are_named_together(folder: Path) -> None:
    (folder / "a.json").write_text("{ }")
    (folder / "b with spaces.txt").unlink()
    (folder / "model.safetensors").touch()
    with pytest.raises(
        ValueError, match=r"a.json was changed, b with spaces.txt is missing, model.safetensors was added"
    ):
        check_checksums(folder)


def test_large_files_are_hashed_on_demand(folder: Path) -> None:
    (folder / "b with spaces.txt").write_bytes(bytes(99) + b"x")
    assert check_checksums(folder, limit=50)
    with pytest.raises(ValueError, match="b with spaces.txt was changed"):
        check_checksums(folder)


@pytest.mark.parametrize("text", ["", "nothing\n", f"{'0' * 64}  ../../etc/passwd\n", "\x00\xff"])
def test_a_damaged_list_is_named_and_leads_nowhere_else(folder: Path, text: str) -> None:
    (folder / SUMS).write_text(text)
    with pytest.raises(ValueError, match="SHA256SUMS is damaged"):
        check_checksums(folder)


def test_a_folder_saved_over_keeps_no_stale_list(tmp_path: Path) -> None:
    out = craft_checkpoint(tiny_dense(tmp_path / "dense"), tmp_path / "out", CONFIG)
    assert check_checksums(out)
    model = pesc.load(out)
    model.save_pretrained(out)
    assert not (out / SUMS).exists()


def test_one_bit_of_a_crafted_folder_is_noticed_when_it_loads(tmp_path: Path) -> None:
    out = craft_checkpoint(tiny_dense(tmp_path / "dense"), tmp_path / "out", CONFIG)
    file = out / "model-experts.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model-experts.safetensors was changed"):
        pesc.load(out)
