"""Models by name: what is there loads, what is not is said plainly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from checkpoints import tiny_dense, without_sums
from pesc import PescConfig, add_lora, craft, craft_checkpoint, save_adapter
from pesc.crafting import sources
from pesc.crafting.embedded import EMBEDDED
from pesc.crafting.info import describe
from pesc.crafting.load import load, load_tokenizer, locate
from pesc.crafting.sources import resolve
from pesc.interop.verify.verify import verify


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


def verify_errors(path: Path) -> None:
    if errors := [finding.message for finding in verify(path).findings if finding.severity == "error"]:
        raise ValueError("; ".join(errors))


def change(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Replace tensors of a checkpoint; None removes one. Two underscores stand for a dot."""
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_dense_model_with_missing_tensors_is_never_filled_in(tmp_path: Path) -> None:
    folder = change(tiny_dense(tmp_path / "dense"), model__layers__1__mlp__down_proj__weight=None)
    change(folder, model__norm__weight=torch.ones(5))
    with pytest.raises(ValueError, match="does not hold the model its config describes") as error:
        load(folder)
    assert "missing: model.layers.1.mlp.down_proj.weight" in str(error.value)
    assert "wrong shape: model.norm.weight is [5] in the file, [32] by the config" in str(error.value)


def test_a_crafted_model_under_a_dense_model_type_keeps_its_experts_or_is_refused(tmp_path: Path) -> None:
    out = craft_checkpoint(tiny_dense(tmp_path / "dense"), tmp_path / "out", PescConfig(num_experts=2, adapter_dim=4))
    file = without_sums(out) / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "llama", "architectures": None}
    file.write_text(json.dumps(config))
    for read in (load, describe, verify_errors):
        with pytest.raises(
            ValueError, match=r"model_type \('llama'\) must be 'pesc', as it has pesc and base_model_type"
        ):
            read(out)
    for key in ("pesc", "base_model_type", "experts_implementation"):
        del config[key]
    file.write_text(json.dumps(config))
    for read in (load, describe, verify_errors):
        with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts.up_proj"):
            read(out)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_not_floating_point_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    craft(load(tiny_dense(tmp_path / "dense")), PescConfig(num_experts=2, adapter_dim=4)).save_pretrained(
        tmp_path / "out"
    )
    for folder in (tmp_path / "dense", tmp_path / "out"):
        change(folder, model__layers__0__mlp__up_proj__weight=torch.ones(48, 32).to(dtype))
        with pytest.raises(ValueError, match="wrong dtype: model.layers.0.mlp.up_proj.weight is"):
            load(folder)
    with pytest.raises(ValueError, match="wrong dtype: model.layers.0.mlp.up_proj.weight is"):
        craft_checkpoint(tmp_path / "dense", tmp_path / "crafted", PescConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformers_weights": "other.safetensors"}, "transformers_weights must be left out"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers \(1000000\) must be at most 1000"),
        ({"vocab_size": 10**9}, "wrong shape: model.embed_tokens.weight"),
        ({"vocab_size": 10**400}, "must be at most"),
        ({"num_attention_heads": 0}, "no model can be built|no config that transformers can read"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "no model can be built"),
        ({"rope_parameters": [1]}, "no config that transformers can read"),
        ({"quantization_config": {"x": 1}}, "transformers knows no such quantization_config"),
        ({"pad_token_id": 10**6}, "no model can be built"),
    ],
)
def test_nonsense_in_a_config_is_one_line_that_names_it(tmp_path: Path, changes: dict, message: str) -> None:
    folder = tiny_dense(tmp_path / "dense")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    for read in (load, describe):
        with pytest.raises(ValueError, match=message) as error:
            read(folder)
        assert str(folder) in str(error.value).splitlines()[0]


@pytest.mark.parametrize("text", ["7", "{", '{"pad_token_id": "x"}', '{"eos_token_id": [1e308]}'])
def test_a_damaged_generation_config_is_named(tmp_path: Path, text: str) -> None:
    folder = tiny_dense(tmp_path / "dense")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load(folder)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    file = tiny_dense(tmp_path / "dense") / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": []}))
    with pytest.raises(FileNotFoundError, match="holds no tokenizer that transformers can load"):
        load_tokenizer(file.parent)


def test_a_config_nested_without_end_is_no_config(tmp_path: Path) -> None:
    folder = tiny_dense(tmp_path / "dense")
    (folder / "config.json").write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(ValueError, match=r"config.json is no valid JSON"):
        load(folder)


def test_another_adapter_in_the_folder_would_change_the_base_and_is_refused(tmp_path: Path) -> None:
    folder = tiny_dense(tmp_path / "dense")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "elsewhere", "peft_type": "LORA"})
    )
    with pytest.raises(ValueError, match=r"adapter_config.json beside config.json"):
        load(folder)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    folder = tiny_dense(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_ref_knows_kind_base_run_and_settings(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense")
    crafted = craft_checkpoint(dense, tmp_path / "crafted", PescConfig(num_experts=2, adapter_dim=4))
    model = add_lora(
        craft(load(dense), PescConfig(num_experts=2, adapter_dim=4)), LoraConfig(r=2, target_modules="all-linear")
    )
    save_adapter(model, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "recipe.yaml").write_text("")
    refs = {path: locate(tmp_path / path) for path in ("dense", "crafted", "run", "run/adapter")}
    assert [ref.kind for ref in refs.values()] == ["dense", "crafted", "adapter", "adapter"]
    assert [ref.base.folder for ref in refs.values()] == [dense, crafted, dense, dense]
    assert [ref.run for ref in refs.values()] == [None, None, tmp_path / "run", tmp_path / "run"]
    assert [ref.pesc_config is None for ref in refs.values()] == [True, False, False, False]
    for ref in refs.values():
        assert not ref.differences().lines()
        assert set(dict(ref.load(folded=True).named_parameters())) == set(dict(ref.skeleton().named_parameters()))
        assert ref.tokenizer().chat_template


def test_a_base_that_has_the_name_of_its_run_is_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dense = tiny_dense(tmp_path / "cache")
    monkeypatch.setattr(sources, "embedded_folder", lambda: dense)
    model = add_lora(load(EMBEDDED), LoraConfig(r=2, target_modules="all-linear"))
    Path(EMBEDDED).mkdir()
    save_adapter(model, Path(EMBEDDED) / "adapter")
    ref = locate(EMBEDDED)
    assert (ref.kind, ref.base.kind, ref.base.folder) == ("adapter", "dense", dense)
