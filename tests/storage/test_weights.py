"""Files that are damaged, or hold more than tensors, are refused, and nothing of them runs."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pesc.interop.formats import import_checkpoint
from pesc.storage import weights
from pesc.storage.weights import Weights
from published import Checkpoint


def test_values_are_the_same_when_a_file_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint()
    found = Weights(checkpoint.save(tmp_path, shards=2))
    monkeypatch.setattr(weights, "REOPEN_BYTES", 1000)
    assert found.tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(found.read(name), tensor) for name, tensor in checkpoint.tensors.items())


@pytest.mark.parametrize("as_bin", [False, True])
def test_truncated_files_are_refused(as_bin: bool, tmp_path: Path) -> None:
    source = Checkpoint().save(tmp_path / "source", as_bin=as_bin)
    file = source / ("pytorch_model.bin" if as_bin else "model.safetensors")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="damaged or truncated"):
        import_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(zipped: bool, tmp_path: Path) -> None:
    source = Checkpoint().save(tmp_path / "source", as_bin=True)
    content = {**Checkpoint().tensors, "extra": _Attack(tmp_path / "ran")}
    if zipped:
        torch.save(content, source / "pytorch_model.bin")
    else:
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="holds more than tensors"):
        import_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_other_things_in_a_bin_file_are_refused(tmp_path: Path) -> None:
    source = Checkpoint().save(tmp_path / "source", as_bin=True)
    torch.save({"state_dict": Checkpoint().tensors, "step": 3}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold tensors only, but state_dict, step are none"):
        import_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(2**40), torch.zeros(4).to_sparse(), torch.zeros(4, device="meta")]
)
def test_tensors_whose_numbers_are_not_in_the_file_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"view": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold tensors only, but view are none"):
        Weights(tmp_path)


def test_compressed_bin_files_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="it is compressed"):
        Weights(tmp_path)


def test_names_that_would_tear_a_message_apart_are_refused(tmp_path: Path) -> None:
    save_file({"a\nb": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a tensor is named 'a\\nb'"):
        Weights(tmp_path)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    source = Checkpoint().save(tmp_path / "source", shards=2)
    index = source / "model.safetensors.index.json"
    save_file({"secret": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"secret": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="files must lie in the folder itself"):
        import_checkpoint(source, tmp_path / "out")


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="is no index of a checkpoint"):
        Weights(tmp_path)


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    torch.save({"new": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    weight_map = {"old": "pytorch_model-00001-of-00001.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert list(Weights(tmp_path).tensors) == ["new"]
