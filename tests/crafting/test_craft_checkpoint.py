"""Crafting on disk: links the dense weights, writes only what is new, leaves nothing half done."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pesc.crafting.craft_checkpoint as checkpoint
from checkpoints import tiny_dense
from pesc import PescConfig, craft_checkpoint
from pesc.crafting.surgery import expert_parameters

CONFIG = PescConfig(num_experts=4, adapter_dim=8)
IDS = torch.arange(3, 14).unsqueeze(0)


@pytest.mark.parametrize("save", [{}, {"max_shard_size": "30KB"}], ids=["single", "sharded"])
def test_computes_what_the_dense_model_does(tmp_path: Path, save: dict) -> None:
    dense = tiny_dense(tmp_path / "dense", **save)
    out = craft_checkpoint(dense, tmp_path / "out", CONFIG)
    crafted, original = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(crafted(IDS).logits, original(IDS).logits)
    assert (out / "tokenizer.json").is_file()


def test_dense_weights_are_linked_and_one_shard_is_new(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense", max_shard_size="30KB")
    out = craft_checkpoint(dense, tmp_path / "out", CONFIG)
    for file in dense.glob("*.safetensors"):
        assert (out / file.name).samefile(file)
    new = {file.name for file in out.glob("*.safetensors")} - {file.name for file in dense.glob("*.safetensors")}
    assert new == {"model-experts.safetensors"}
    crafted = AutoModelForCausalLM.from_pretrained(out)
    assert set(load_file(out / "model-experts.safetensors")) == set(expert_parameters(crafted))


def test_only_weights_are_linked_so_that_later_saves_stay_in_the_new_folder(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense")
    before = {file.name: file.read_bytes() for file in dense.iterdir()}
    out = craft_checkpoint(dense, str(tmp_path / "out"), CONFIG)
    crafted = AutoModelForCausalLM.from_pretrained(out)
    crafted.generation_config.max_new_tokens = 7
    crafted.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.chat_template = "changed"
    tokenizer.save_pretrained(out)
    assert {file.name: file.read_bytes() for file in dense.iterdir()} == before


def test_new_weights_take_the_checkpoints_dtype(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense")
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(dense / "model.safetensors").items()}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    out = craft_checkpoint(dense, tmp_path / "out", CONFIG)
    with safe_open(out / "model-experts.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_existing_output_is_never_touched(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        craft_checkpoint(dense, tmp_path / "out", CONFIG)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_dense(tmp_path / "dense")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device: free some space"):
        craft_checkpoint(dense, tmp_path / "out", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense", max_shard_size="30KB")
    shard = sorted(dense.glob("model-*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}, named by its index"):
        craft_checkpoint(dense, tmp_path / "out", CONFIG)
    shard.write_bytes(whole)
    index = dense / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = dense / values["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lack {name}, named by model.safetensors.index.json"):
        craft_checkpoint(dense, tmp_path / "out", CONFIG)
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"missing: {name}"):
        craft_checkpoint(dense, tmp_path / "out", CONFIG)


def test_extra_and_misshapen_dense_weights_are_refused(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors") | {"model.layers.2.mlp.foo": torch.zeros(1)}
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected: model.layers.2.mlp.foo\n.*wrong shape: model.norm.weight"):
        craft_checkpoint(dense, tmp_path / "out", CONFIG)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense")
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        craft_checkpoint(dense, tmp_path / "out", CONFIG)


def test_pickled_and_crafted_checkpoints_are_refused(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match="already crafted"):
        craft_checkpoint(craft_checkpoint(dense, tmp_path / "once", CONFIG), tmp_path / "twice", CONFIG)
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="save the model again as safetensors"):
        craft_checkpoint(dense, tmp_path / "out", CONFIG)
