"""Our folders go out in the published layouts and come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import oracle
import pesc
from checkpoints import without_sums
from families import tokens
from pesc.interop.formats import export, import_checkpoint
from pesc.interop.published import exporter
from pesc.interop.published.layouts import config_from, detect
from published import CAMELIDAE, FIXTURES, SPARSETRAL, crafted

WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "layer_types": None}
SHAPES = {"hidden_size": 40, "head_dim": 10, "num_hidden_layers": 5, "vocab_size": 97}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
GATED = {"adapter_placement": "parallel", "adapter_activation": "swiglu"}
# (layout, base family, what differs in the dense config, the family it comes back as)
CASES = {
    "llama": ("camelidae", "llama", {}, "llama"),
    "no GQA": ("camelidae", "llama", {"num_key_value_heads": 4}, "llama"),
    "other shapes": ("camelidae", "llama", SHAPES, "llama"),
    "one layer": ("sparsetral", "llama", {"num_hidden_layers": 1}, "mistral"),
    "tied": ("camelidae", "llama", {"tie_word_embeddings": True}, "llama"),
    "rope theta": ("camelidae", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "llama"),
    "rope scaling": ("camelidae", "llama", LINEAR, "llama"),
    "window": ("sparsetral", "mistral", {"sliding_window": 3}, "mistral"),
    "no window": ("sparsetral", "mistral", {"sliding_window": None}, "mistral"),
    "mistral in camelidae": ("camelidae", "mistral", {"sliding_window": None}, "llama"),
    "llama in sparsetral": ("sparsetral", "llama", {"num_key_value_heads": 4}, "mistral"),
    "QKV biases": ("camelidae", "qwen2", {}, "qwen2"),
    "QKV biases and window": ("camelidae", "qwen2", WINDOW, "qwen2"),
}
METHODS = [
    {},
    {"num_experts": 3, "num_experts_per_tok": 3, "adapter_dim": 5},
    {"num_experts": 11, "num_experts_per_tok": 1, "adapter_scaling": 1.0, "adapter_dropout": 0.1},
    {"num_experts": [4, 4, 4], "num_experts_per_tok": 2, "layers": [0, 1, 2], "router_aux_loss_coef": 0.02},
]


def _round_trip(layout: str, family: str, dense: dict, back: str, folder: Path, **method) -> Path:
    model = crafted(folder / "ours", family, dense, **method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder / "ours")
    theirs = export(folder / "ours", folder / "theirs", layout)
    again = import_checkpoint(theirs, folder / "again")
    first, second = load_file(folder / "ours" / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    # grouped_mm, the default, takes only widths whose rows are a multiple of 16 bytes.
    before, loaded = (pesc.load(path, experts_implementation="eager") for path in (folder / "ours", again))
    assert loaded.config.base_model_type == back
    logits = loaded(tokens()).logits
    assert torch.equal(logits, before(tokens()).logits)
    values = json.loads((theirs / "config.json").read_text())
    expected = oracle.logits(values, load_file(theirs / "model.safetensors"), tokens())
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)
    return theirs


@pytest.mark.parametrize("name", CASES)
def test_out_and_in_again_changes_no_bit(name: str, tmp_path: Path) -> None:
    layout, family, dense, back = CASES[name]
    theirs = _round_trip(layout, family, dense, back, tmp_path)
    keys = load_file(theirs / "model.safetensors").keys()
    middle = "experts.expert_3.adapter_up" if layout == "camelidae" else "experts.3.adapter_up"
    assert f"model.layers.0.mlp.moe_adapter.{middle}.weight" in keys
    values = json.loads((theirs / "config.json").read_text())
    expected = "sparsetral" if layout == "sparsetral" else "qwen2idae" if family == "qwen2" else "camelidae"
    assert values["model_type"] == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["camelidae", "sparsetral"])
def test_other_settings_survive(method: dict, layout: str, tmp_path: Path) -> None:
    _round_trip(layout, "llama", {}, "llama" if layout == "camelidae" else "mistral", tmp_path, **method)
    ours, again = (pesc.load(tmp_path / name).config.pesc_config for name in ("ours", "again"))
    for field in ("adapter_scaling", "adapter_dropout", "router_aux_loss_coef", "num_experts_per_tok"):
        assert getattr(again, field) == getattr(ours, field)


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    model = crafted(tmp_path / "a").bfloat16()
    model.save_pretrained(tmp_path / "ours")
    theirs = export(tmp_path / "ours", tmp_path / "theirs", "camelidae")
    values = json.loads((theirs / "config.json").read_text())
    assert (values["torch_dtype"], values["moe_dtype"]) == ("bfloat16", "bfloat16")
    assert {tensor.dtype for tensor in load_file(theirs / "model.safetensors").values()} == {torch.bfloat16}
    assert next(pesc.load(import_checkpoint(theirs, tmp_path / "again")).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("fixture", [CAMELIDAE, SPARSETRAL], ids=lambda path: path.name)
def test_an_imported_model_goes_back_key_for_key(fixture: Path, tmp_path: Path) -> None:
    layout = fixture.name.split("-")[0]
    model = pesc.load(import_checkpoint(fixture, tmp_path / "ours"))
    model.save_pretrained(tmp_path / "saved")
    theirs = export(tmp_path / "saved", tmp_path / "theirs", layout)
    first, second = load_file(fixture / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    assert json.loads((theirs / "config.json").read_text()) == json.loads((fixture / "config.json").read_text())


def test_what_changed_since_the_import_is_in_the_config(tmp_path: Path) -> None:
    folder = without_sums(import_checkpoint(CAMELIDAE, tmp_path / "ours"))
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["pesc"]["num_experts_per_tok"] = 3
    values["eos_token_id"] = 7
    values["rope_parameters"]["rope_theta"] = 5e4
    path.write_text(json.dumps(values))
    theirs = json.loads((export(folder, tmp_path / "theirs", "camelidae") / "config.json").read_text())
    source = json.loads((CAMELIDAE / "config.json").read_text())
    assert theirs == source | {"topk": 3, "eos_token_id": 7, "rope_theta": 5e4}


@pytest.mark.parametrize("file", sorted((FIXTURES / "published-configs").iterdir()), ids=lambda path: path.stem)
def test_published_configs_come_back_as_they_were(file: Path) -> None:
    values = json.loads(file.read_text())
    layout = detect(values, [])
    config = config_from(values, layout, [])
    returned = exporter._returned_config(config, layout, config.imported_from, [], "bfloat16")
    assert returned == values


def test_shards_hold_what_one_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crafted(tmp_path / "ours")
    monkeypatch.setattr(exporter, "SHARD_BYTES", 20_000)
    theirs = export(tmp_path / "ours", tmp_path / "theirs", "camelidae")
    files = list(theirs.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 30_000 for file in files)
    again = import_checkpoint(theirs, tmp_path / "again")
    assert torch.equal(pesc.load(again)(tokens()).logits, pesc.load(tmp_path / "ours")(tokens()).logits)


@pytest.mark.parametrize(
    ("layout", "family", "dense", "method", "reason"),
    [
        ("camelidae", "llama", {}, GATED, "granitemoeshared"),
        ("camelidae", "llama", {}, {"adapter_activation": "swiglu"}, r"sequential \+ swiglu.*--format pesc"),
        ("sparsetral", "llama", {}, {"num_experts": [4, 2, 4]}, r"num_experts \(\[4, 2, 4\]\) differs between layers"),
        ("camelidae", "llama", {}, {"layers": [0, 2]}, r"only layers \[0, 2\] have experts"),
        ("camelidae", "qwen3", {}, {}, "its base is qwen3"),
        ("sparsetral", "qwen2", {}, {}, "its base is qwen2.*--format camelidae"),
        ("camelidae", "mistral", {}, {}, r"its sliding_window \(8\).*--format sparsetral"),
        ("camelidae", "llama", {"attention_bias": True}, {}, "its Llama base has biases"),
        ("camelidae", "llama", {"head_dim": 16}, {}, r"its head_dim \(16\)"),
        ("sparsetral", "llama", LINEAR, {}, "its rope_type is 'linear'"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_with_a_way_out(
    layout: str, family: str, dense: dict, method: dict, reason: str, tmp_path: Path
) -> None:
    crafted(tmp_path / "ours", family, dense, **method)
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "ours", tmp_path / "theirs", layout)
    assert not (tmp_path / "theirs").exists()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    crafted(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj"]
    save_file(tensors, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.experts\.down_proj"):
        export(tmp_path / "ours", tmp_path / "theirs", "camelidae")
    LlamaConfig().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="it has no experts: it is a dense llama model"):
        export(tmp_path / "dense", tmp_path / "theirs", "camelidae")
