"""Whole files pass, and every way to lose or spoil experts is caught."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from checkpoints import without_sums
from families import FAMILIES, disturb, tiny_model
from pesc import PescConfig, add_lora, craft, save_adapter
from pesc.crafting.craft_checkpoint import craft_checkpoint
from pesc.interop.formats import export, import_checkpoint
from pesc.interop.verify.verify import Report, verify
from published import CAMELIDAE, GATED, SPARSETRAL, Checkpoint, crafted


def _messages(report: Report, severity: str = "error") -> list[str]:
    return [finding.message for finding in report.findings if finding.severity == severity]


def _change(folder: Path, **changes) -> Path:
    """Replace (or, with None, drop) tensors of a folder by their names, dots written as __."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_our_folders_are_whole(family: str, tmp_path: Path) -> None:
    crafted(tmp_path / "ours", family, num_experts=[4, 2], num_experts_per_tok=[2, 1], layers=[0, 2])
    report = verify(tmp_path / "ours")
    assert report.complete
    assert report.findings == []
    assert (report.kind, report.facts["experts promised"], report.facts["experts present"]) == ("crafted", 6, 6)
    assert report.facts["dtypes"] == {"float32": report.facts["tensors"]}
    assert json.loads(json.dumps(report.to_dict()))["complete"] is True


def test_crafted_checkpoints_on_disk_are_whole_and_untouched(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    craft_checkpoint(tmp_path / "dense", tmp_path / "ours", PescConfig(num_experts=4, adapter_dim=8))
    report = verify(tmp_path / "ours")
    assert report.complete
    assert report.facts["untouched experts"] == 12
    assert "untouched experts: all" in _messages(report, "warning")[0]


def test_lost_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    crafted(tmp_path)
    _change(
        tmp_path,
        model__layers__1__mlp__experts__up_proj=None,
        model__layers__0__mlp__experts__down_proj=None,
        model__layers__2__mlp__router__weight=torch.zeros(5, 32),
        model__layers__2__mlp__experts__extra=torch.zeros(1),
    )
    report = verify(tmp_path)
    assert not report.complete
    assert report.facts["experts present"] == 4
    assert _messages(report) == [
        "8 of 12 experts are not complete: layer 0: 0, 1, 2, 3; layer 1: 0, 1, 2, 3",
        "missing: model.layers.0.mlp.experts.down_proj",
        "missing: model.layers.1.mlp.experts.up_proj",
        "unexpected: model.layers.2.mlp.experts.extra",
        "wrong shape: model.layers.2.mlp.router.weight is [5, 32] in the file, [4, 32] by the config",
        "model.layers.2.mlp.router.weight gives all experts the same score, so this router cannot choose",
    ]


@pytest.mark.parametrize("kind", ["crafted", "adapter", "granitemoeshared"])
def test_experts_that_are_all_lost_are_one_finding(kind: str, tmp_path: Path) -> None:
    folder = _adapter(tmp_path) if kind == "adapter" else tmp_path / "ours"
    if kind != "adapter":
        crafted(folder, **GATED)
    if kind == "granitemoeshared":
        folder = export(folder, tmp_path / "theirs", kind)
    file = next(without_sums(folder).glob("*.safetensors"))
    save_file(
        {
            name: tensor
            for name, tensor in load_file(file).items()
            if "expert" not in name and "moe" not in name and "router" not in name
        },
        file,
        {"format": "pt"},
    )
    (message,) = _messages(verify(folder))
    assert message.startswith("all experts are lost: the config promises them (")


def test_spoiled_values_are_found(tmp_path: Path) -> None:
    crafted(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    up, down = tensors["model.layers.0.mlp.experts.up_proj"], tensors["model.layers.0.mlp.experts.down_proj"]
    down[1] = 0
    up[3], down[3] = up[2], down[2]
    blank_up, blank_down = (tensors[f"model.layers.2.mlp.experts.{name}_proj"] for name in ("up", "down"))
    blank_up[0], blank_down[0], blank_up[3] = 0, 0, 0
    norm = tensors["model.norm.weight"].bfloat16()
    norm[:3], norm[5] = torch.nan, torch.inf
    _change(
        tmp_path,
        model__layers__0__mlp__experts__up_proj=up,
        model__layers__0__mlp__experts__down_proj=down,
        model__layers__2__mlp__experts__up_proj=blank_up,
        model__layers__2__mlp__experts__down_proj=blank_down,
        model__norm__weight=norm,
    )
    report = verify(tmp_path)
    errors, warnings = _messages(report), _messages(report, "warning")
    assert not report.complete
    assert errors[0] == "model.norm.weight holds 3 NaN and 1 inf"
    assert errors[1].startswith("blank experts: 2 (") and "layer 2: 0, 3" in errors[1]
    assert errors[2] == "2 experts are duplicates, bit for bit: layer 0: 2, 3"
    assert "dtypes are mixed" in warnings[0] and "1 tensors of bfloat16" in warnings[0]
    assert "untouched experts: 1 (" in warnings[1] and "layer 0: 1" in warnings[1]


def test_untouched_experts_alone_do_not_fail(tmp_path: Path) -> None:
    crafted(tmp_path)
    down = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
    down[2] = 0
    assert verify(_change(tmp_path, model__layers__1__mlp__experts__down_proj=down)).complete


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "pesc"}'])
def test_a_broken_config_is_a_finding(content: str, tmp_path: Path) -> None:
    crafted(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert not verify(tmp_path).complete


NONSENSE = {
    "ours": {
        "hidden_size": 0,
        "rms_norm_eps": float("nan"),
        "head_dim": -1,
        "dtype": "x",
        "vocab_size": 0,
        "quantization_config": [1],
    },
    "camelidae": {
        "auto_map": [1],
        "architectures": 1,
        "rms_norm_eps": -1.0,
        "num_attention_heads": 0,
        "torch_dtype": {},
    },
    "stock": {
        "num_hidden_layers": "x",
        "rope_parameters": {"rope_theta": float("inf")},
        "rms_norm_eps": None,
        "num_local_experts": 3,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in NONSENSE.items() for field in fields])
def test_a_config_that_makes_no_sense_is_a_finding(kind: str, field: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    if kind == "camelidae":
        shutil.copytree(CAMELIDAE, folder)
    else:
        crafted(tmp_path / "ours", **GATED)
    if kind == "stock":
        export(tmp_path / "ours", folder, "stock")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {field: NONSENSE[kind][field]}))
    # Nothing but names of classes stands in these two, so the experts can still be counted.
    assert verify(folder).complete == (field in ("auto_map", "architectures"))


@pytest.mark.parametrize("as_bin", [False, True])
def test_truncated_files_are_a_finding(as_bin: bool, tmp_path: Path) -> None:
    Checkpoint().save(tmp_path, as_bin=as_bin)
    file = tmp_path / ("pytorch_model.bin" if as_bin else "model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged or truncated" in _messages(verify(tmp_path))[0]


def test_missing_shards_are_a_finding_and_missing_models_an_error(tmp_path: Path) -> None:
    Checkpoint().save(tmp_path, shards=3)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    assert "lacks model-00003-of-00003.safetensors" in _messages(verify(tmp_path))[0]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        verify(Path(__file__).parent)
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        verify(Path(__file__))


@pytest.mark.parametrize(("fixture", "experts"), [(CAMELIDAE, 24), (SPARSETRAL, 48)])
@pytest.mark.parametrize("as_bin", [False, True])
def test_published_layouts_are_whole(fixture: Path, experts: int, as_bin: bool, tmp_path: Path) -> None:
    report = verify(Checkpoint(fixture).save(tmp_path, shards=2, as_bin=as_bin))
    assert report.complete
    assert report.findings == []
    assert report.kind == fixture.name.split("-")[0]
    assert (report.facts["experts promised"], report.facts["experts present"]) == (experts, experts)
    assert verify(import_checkpoint(fixture, tmp_path / "ours")).complete


STRIPPED = {
    "as published": {},
    "llama": {"model_type": "llama"},
    "without pointers to code": {"model_type": "llama", "auto_map": {}, "architectures": ["LlamaForCausalLM"]},
    "without any setting": {
        "adapter_dim": None, "moe_scaling": None, "topk": None, "num_experts": None, "moe_dtype": None,
    },
    "by its old name": {
        "adapter_dim": None, "moe_scaling": None, "topk": None, "num_experts": None, "model_type": "llama",
        "auto_map": {}, "architectures": ["LlamaForCausalLM"], "_name_or_path": "hywu/Camelidae-8x7B",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STRIPPED)
def test_stripped_experts_are_caught(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint().without("moe_adapter")
    config = checkpoint.config | STRIPPED[name]
    checkpoint.config = {key: value for key, value in config.items() if value is not None}
    report = verify(checkpoint.save(tmp_path))
    assert not report.complete
    assert _messages(report)[0].startswith("all experts are lost")


def test_some_lost_experts_are_named(tmp_path: Path) -> None:
    lost = ("layers.1.mlp.moe_adapter.experts.expert_3.", "layers.2.mlp.moe_adapter.experts.expert_7.adapter_up")
    report = verify(Checkpoint().without(*lost).save(tmp_path))
    assert _messages(report)[0] == "2 of 24 experts are not complete: layer 1: 3; layer 2: 7"
    assert report.facts["experts present"] == 22
    assert sum(message.startswith("missing: ") for message in _messages(report)) == 3


def test_keys_without_a_config_that_says_so_are_judged_too(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    for field in ("topk", "adapter_dim", "moe_scaling"):
        del checkpoint.config[field]
    checkpoint.config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": {}}
    assert "the config lacks topk, adapter_dim, moe_scaling" in _messages(verify(checkpoint.save(tmp_path)))[0]


def test_dense_models_promise_nothing(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    report = verify(tmp_path)
    assert report.complete
    assert "no experts" in _messages(report, "note")[0]
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_local_experts": 8}))
    assert "all experts are lost" in _messages(verify(tmp_path))[0]
    assert "num_local_experts 8" in _messages(verify(tmp_path))[0]


STOCK = {
    "GraniteMoeShared": {"shared_intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_architectures(name: str, tmp_path: Path) -> None:
    dense = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = getattr(transformers, f"{name}Config")(**dense, num_key_value_heads=2, **STOCK[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    report = verify(tmp_path)
    assert report.complete, report.findings
    assert (report.facts["experts promised"], report.facts["experts present"]) == (12, 12)
    experts = [key for key in load_file(tmp_path / "model.safetensors") if "moe." in key or ".experts." in key]
    part = [key for key in experts if ".1." in key and (".experts.3." in key or "output_linear" in key)][-1]
    assert "of 12 experts are not complete: layer 1: " in _messages(verify(_change(tmp_path, **{part: None})))[0]
    layer = {key: None for key in experts if "layers.2." in key}
    assert _messages(verify(_change(tmp_path, **layer)))[0].endswith("; layer 2: 0, 1, 2, 3")


STOCK_EXPORTS = {"granitemoeshared": "llama", "qwen2_moe": "qwen2", "qwen3_next": "qwen3"}


@pytest.mark.parametrize("format", STOCK_EXPORTS)
def test_every_tensor_of_a_stock_export_counts(format: str, tmp_path: Path) -> None:
    crafted(tmp_path / "ours", STOCK_EXPORTS[format], {"tie_word_embeddings": False}, **GATED)
    out = without_sums(export(tmp_path / "ours", tmp_path / "out", format))
    report = verify(out)
    assert report.findings == [] and report.facts["experts present"] == 12
    whole = load_file(out / "model.safetensors")
    of_the_middle = [name for name in whole if "layers.0." not in name and "layers.2." not in name]
    for name in of_the_middle:
        save_file({n: t for n, t in whole.items() if n != name}, out / "model.safetensors", {"format": "pt"})
        assert f"missing: {name}" in _messages(verify(out)), name
    extra = whole | {"model.layers.1.mlp.gate.bias": torch.ones(4)}
    save_file(extra, out / "model.safetensors", {"format": "pt"})
    assert _messages(verify(out)) == ["unexpected: model.layers.1.mlp.gate.bias"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_zeroed_tensors_are_told_from_those_that_start_at_zero(family: str, tmp_path: Path) -> None:
    crafted(tmp_path, family)
    whole = load_file(tmp_path / "model.safetensors")
    usual = {n for n in whole if n.endswith(".bias") or (family == "gemma2" and "norm" in n)}
    for name in whole:
        if ".experts." not in name and "router" not in name and ".1." not in name:
            save_file(whole | {name: torch.zeros_like(whole[name])}, tmp_path / "model.safetensors", {"format": "pt"})
            assert verify(tmp_path).complete == (name in usual), name


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_router_that_cannot_choose_is_found(value: float, tmp_path: Path) -> None:
    crafted(tmp_path)
    router = "model.layers.1.mlp.router.weight"
    uniform = torch.full((4, 32), value)
    assert _messages(verify(_change(tmp_path, **{router: uniform}))) == [
        f"{router} gives all experts the same score, so this router cannot choose"
    ]
    other = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.router.weight"]
    messages = _messages(verify(_change(tmp_path, **{router: other})))
    assert messages == [f"2 routers are duplicates, bit for bit: model.layers.0.mlp.router.weight, {router}"]


def test_quantized_models_are_not_compared(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    name = "model.layers.1.self_attn.q_proj."
    assert verify(tmp_path).complete
    _change(tmp_path, **{f"{name}weight": None, f"{name}qweight": torch.zeros(4, 32, dtype=torch.int32)})
    report = verify(tmp_path)
    assert report.complete
    assert "quantized weights" in _messages(report, "note")[1]


def test_files_of_a_backbone_alone_are_whole(tmp_path: Path) -> None:
    tiny_model("gpt2").base_model.save_pretrained(tmp_path)
    assert verify(tmp_path).complete
    _change(tmp_path, h__1__attn__c_attn__weight=None)
    assert _messages(verify(tmp_path)) == ["missing: transformer.h.1.attn.c_attn.weight"]


def _adapter(folder: Path, lora: bool = True) -> Path:
    tiny_model("llama").save_pretrained(folder / "base")
    from pesc import load

    model = craft(load(folder / "base"), PescConfig(num_experts=4, adapter_dim=8))
    disturb(model)
    if lora:
        add_lora(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    return save_adapter(model, folder / "run" / "adapter")


@pytest.mark.parametrize("lora", [False, True])
def test_adapter_folders(lora: bool, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path, lora)
    for path in (adapter, adapter.parent):
        report = verify(path)
        assert report.complete, report.findings
        assert (report.kind, report.facts["experts promised"], report.facts["experts present"]) == ("adapter", 12, 12)
    file = without_sums(adapter) / "adapter.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.down_proj"]
    tensors["model.layers.0.mlp.router.weight"] = torch.full((3, 32), torch.nan)
    save_file(tensors, file)
    assert _messages(verify(adapter)) == [
        "4 of 12 experts are not complete: layer 1: 0, 1, 2, 3",
        "missing: model.layers.1.mlp.experts.down_proj",
        "wrong shape: model.layers.0.mlp.router.weight is [3, 32] in the file, [4, 32] by the config",
        "model.layers.0.mlp.router.weight holds 96 NaN",
    ]


def test_an_adapter_is_not_complete_without_its_base(tmp_path: Path) -> None:
    adapter = without_sums(_adapter(tmp_path))
    base, elsewhere = tmp_path / "base", tmp_path / "elsewhere"
    base.rename(elsewhere)
    assert "the base could not be checked" in _messages(verify(adapter))[0]
    assert "--base" in _messages(verify(adapter))[0]
    assert verify(adapter, base=elsewhere).complete
    weights = (elsewhere / "model.safetensors").read_bytes()
    _change(elsewhere, model__norm__weight=None)
    messages = _messages(verify(adapter, base=elsewhere))
    assert "it needs the weights it was trained on" in messages[0]
    torch.save({}, elsewhere / "pytorch_model.bin")
    (elsewhere / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor" in _messages(verify(adapter, base=elsewhere))[0]
    (elsewhere / "model.safetensors").write_bytes(weights)
    assert verify(adapter, base=elsewhere).complete
    (adapter / "adapter.json").write_text("{}")
    assert not verify(adapter).complete
    (adapter / "adapter.safetensors").unlink()
    assert "holds no adapter.safetensors" in _messages(verify(adapter))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_ours_is_whole(family: str, tmp_path: Path) -> None:
    crafted = disturb(craft(tiny_model(family), PescConfig(num_experts=4, adapter_dim=8)))
    crafted.save_pretrained(tmp_path)
    assert verify(tmp_path).findings == []
