"""Files and folders that appear complete or not at all, whoever else is at work and whatever the disk does."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pesc.storage.files import new_file, new_folder, read_json, write_text
from pesc.storage.lock import locked


def _hold(folder: Path, connection: Connection) -> None:
    with locked(folder):
        connection.send("held")
        connection.recv()


def test_a_folder_that_another_process_holds_is_refused_until_it_lets_go_or_dies(tmp_path: Path) -> None:
    for end in ("lets go", "dies"):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path / "run", theirs))
        process.start()
        theirs.close()  # so that a process that fails ends the wait
        assert ours.recv() == "held"
        message = f"process {process.pid} on .* is at work on .*run: wait for it, or stop it"
        with pytest.raises(BlockingIOError, match=message), locked(tmp_path / "run"):
            pass
        process.kill() if end == "dies" else ours.send("let go")
        process.join()
        with locked(tmp_path / "run"), locked(tmp_path / "run"):
            assert (tmp_path / "run").is_dir()
        assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_or_waits(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with pytest.raises(FileExistsError), new_folder(tmp_path / "out", wait=True):
            order.append("wrote again")
        order.append("second")

    thread = threading.Thread(target=second)
    with new_folder(tmp_path / "out"):
        (tmp_path / ".out.partial" / ".lock").write_text("1 elsewhere")
        with pytest.raises(BlockingIOError, match="process 1 elsewhere is at work on"), new_folder(tmp_path / "out"):
            pass
        thread.start()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial" / "out"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    (tmp_path / ".out.partial" / ".lock").write_text("1 elsewhere")
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("all")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == [Path("out"), Path("out/file")]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "new \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A disk of 64 KiB, on machines where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=64k tmpfs '{disk}' 2> {os.devnull}"):
        pytest.skip("may not mount a disk")
    yield disk
    os.system(f"umount -l '{disk}'")  # torch keeps the file of a failed write open


@pytest.mark.parametrize("how", ["python", "safetensors", "torch"])
def test_a_full_disk_is_one_line_that_names_the_place(how: str, small_disk: Path) -> None:
    tensors = {"a": torch.zeros(50_000)}
    with pytest.raises(OSError) as caught, new_file(small_disk / "out") as partial:
        if how == "python":
            partial.write_bytes(bytes(200_000))
        elif how == "safetensors":
            save_file(tensors, partial)
        else:
            torch.save(tensors, partial)
    assert caught.value.errno == errno.ENOSPC
    assert f"{small_disk / 'out'} was not written, No space left on device: free some space" in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_a_folder_that_vanished_and_was_made_anew_is_not_complete(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="was removed while it was written"),
        new_folder(tmp_path / "out") as part,
    ):
        (part / "first").write_text("first")
        shutil.rmtree(part.parent)
        write_text(part / "second", "second")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of ours"), new_file(tmp_path / "out"):
        raise RuntimeError("of ours")
    with pytest.raises(FileNotFoundError, match="/no/such/source"), new_file(tmp_path / "out"):
        Path("/no/such/source").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_file_too_large_to_be_json_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "adapter.json"
    file.touch()
    os.truncate(file, 300 * 1024**2)
    with pytest.raises(ValueError, match=r"adapter\.json has 314572800 bytes, more than the \d+ that are read"):
        read_json(file)
