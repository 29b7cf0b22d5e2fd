"""The published layouts come in whole, computing what their own code computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import oracle
import pesc
from families import tokens
from pesc.interop.formats import import_checkpoint
from published import CAMELIDAE, SPARSETRAL, Checkpoint


def _bits(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def _same(a: Path, b: Path) -> bool:
    first, second = _bits(a), _bits(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("fixture", [CAMELIDAE, SPARSETRAL], ids=lambda path: path.name)
def test_logits_are_those_of_the_authors_code(fixture: Path, tmp_path: Path) -> None:
    expected = load_file(fixture / "expected.safetensors")
    checkpoint = Checkpoint(fixture)
    plainly = oracle.logits(checkpoint.config, checkpoint.tensors, expected["input_ids"])
    torch.testing.assert_close(plainly.float(), expected["logits"], atol=1e-5, rtol=0)
    folder = import_checkpoint(fixture, tmp_path / "out")
    # The reference's attention is eager; with another one, rounding alone moves router logits of 12 by 1.4e-5.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    out = model(expected["input_ids"], output_router_logits=True)
    torch.testing.assert_close(out.logits, expected["logits"], atol=1e-5, rtol=0)
    for layer, logits in enumerate(out.router_logits):
        torch.testing.assert_close(logits, expected[f"router_logits.{layer}"], atol=1e-5, rtol=0)
    default = pesc.load(folder)(expected["input_ids"], output_router_logits=True)
    torch.testing.assert_close(default.logits, expected["logits"], atol=1e-5, rtol=0)
    for layer, logits in enumerate(default.router_logits):
        torch.testing.assert_close(logits, expected[f"router_logits.{layer}"], atol=1e-5, rtol=1e-5)


def test_weights_keep_their_names_values_and_order_of_experts(tmp_path: Path) -> None:
    theirs = load_file(SPARSETRAL / "model.safetensors")
    ours = _bits(import_checkpoint(SPARSETRAL, tmp_path / "out"))
    assert torch.equal(ours["model.layers.1.mlp.up_proj.weight"], theirs["model.layers.1.mlp.up_proj.weight"])
    start = "model.layers.1.mlp.moe_adapter"
    assert torch.equal(ours["model.layers.1.mlp.router.weight"], theirs[f"{start}.router.weight"])
    for expert in (0, 2, 10, 15):
        for part, name in (("down", "up_proj"), ("up", "down_proj")):
            expected = theirs[f"{start}.experts.{expert}.adapter_{part}.weight"]
            assert torch.equal(ours[f"model.layers.1.mlp.experts.{name}"][expert], expected)


@pytest.mark.parametrize("fixture", [CAMELIDAE, SPARSETRAL], ids=lambda path: path.name)
@pytest.mark.parametrize(
    "form",
    [{"shards": 5}, {"as_bin": True}, {"as_bin": True, "shards": 4}, {"as_bin": True, "shards": 3, "legacy": True}],
)
def test_every_form_of_files_gives_the_same_folder(fixture: Path, form: dict, tmp_path: Path) -> None:
    source = Checkpoint(fixture).save(tmp_path / "source", **form)
    assert _same(import_checkpoint(source, tmp_path / "out"), import_checkpoint(fixture, tmp_path / "expected"))
    count = len(list((tmp_path / "out").glob("*.safetensors")))
    assert (count > 1) == (form.get("shards", 1) > 1) == (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert pesc.load(tmp_path / "out").config.base_model_type in ("llama", "mistral")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its own peak memory from /proc")
def test_memory_is_bounded_by_the_largest_file(tmp_path: Path) -> None:
    """A checkpoint of 230 MB in files of 23 MB: one file read and one written, far from the whole."""
    checkpoint = Checkpoint()
    checkpoint.config["intermediate_size"] = 133 * 1000
    for name, tensor in checkpoint.tensors.items():
        if 96 in tensor.shape:
            size = [133 * 1000 if n == 96 else n for n in tensor.shape]
            checkpoint.tensors[name] = torch.randn(size)
    source = checkpoint.save(tmp_path / "source", shards=10)
    code = (
        "import re; from pathlib import Path; import torch\n"
        "from pesc.interop.formats import import_checkpoint\n"
        "from published import CAMELIDAE\n"
        "status = lambda key: int(re.search(key + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        f"import_checkpoint(CAMELIDAE, Path({str(tmp_path / 'warm')!r}))\n"
        "Path('/proc/self/clear_refs').write_text('5'); before = status('VmRSS')\n"
        f"import_checkpoint({str(source)!r}, Path({str(tmp_path / 'out')!r})); print(status('VmHWM') - before)"
    )
    paths = [str(Path(__file__).parents[2])]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path += {paths!r}\n{code}"], capture_output=True, text=True, check=True
    )
    files = [file.stat().st_size for file in source.glob("*.safetensors")]
    assert int(run.stdout) < 2.2 * max(files) < 0.6 * sum(files)


@pytest.mark.parametrize("fixture", [CAMELIDAE, SPARSETRAL], ids=lambda path: path.name)
def test_a_dense_model_type_does_not_hide_the_experts(fixture: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(fixture)
    del checkpoint.config["auto_map"]
    checkpoint.config |= {"model_type": "llama", "architectures": [checkpoint.config["architectures"][0].split(".")[1]]}
    folder = import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out")
    assert _same(folder, import_checkpoint(fixture, tmp_path / "expected"))
    family = pesc.load(folder).config.base_model_type
    assert family == ("llama" if fixture == CAMELIDAE else "mistral")


def test_without_a_number_of_key_heads_there_are_as_many_as_heads(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    del checkpoint.config["num_key_value_heads"]
    with pytest.raises(ValueError, match=r"k_proj\.weight is \[16, 48\] in the file, \[48, 48\] by the config"):
        import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out")
    for name, tensor in checkpoint.tensors.items():
        if "k_proj" in name or "v_proj" in name:
            checkpoint.tensors[name] = tensor.repeat(3, 1)
    model = pesc.load(import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out"))
    checkpoint.config["num_key_value_heads"] = 6
    expected = oracle.logits(checkpoint.config, checkpoint.tensors, tokens())
    torch.testing.assert_close(model(tokens()).logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_window_makes_a_mistral_of_a_llama_model_type(tmp_path: Path) -> None:
    checkpoint = Checkpoint(SPARSETRAL)
    checkpoint.config |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "auto_map": {},
        "sliding_window": 5,
    }
    model = pesc.load(import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out"))
    assert (model.config.base_model_type, model.config.sliding_window) == ("mistral", 5)


def test_query_biases_make_a_qwen2(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for layer in range(3):
        for name, width in (("q", 48), ("k", 16), ("v", 16)):
            checkpoint.tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.randn(width)
    model = pesc.load(import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out"))
    assert model.config.base_model_type == "qwen2"
    assert torch.equal(
        model.model.layers[2].self_attn.k_proj.bias, checkpoint.tensors["model.layers.2.self_attn.k_proj.bias"]
    )


def test_stripped_experts_are_all_named(tmp_path: Path) -> None:
    source = Checkpoint().without("moe_adapter").save(tmp_path / "source")
    with pytest.raises(ValueError, match="all experts are lost") as error:
        import_checkpoint(source, tmp_path / "out")
    assert str(error.value).count("missing: ") == 3 * (8 * 2 + 1)
    assert "num_experts 8" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_every_mismatch_is_named_at_once(tmp_path: Path) -> None:
    checkpoint = Checkpoint().without("layers.1.mlp.moe_adapter.experts.expert_3.", "layers.0.self_attn.q_proj")
    start = "model.layers.0.mlp.moe_adapter"
    checkpoint.tensors[f"{start}.router.weight"] = torch.zeros(7, 48)
    checkpoint.tensors[f"{start}.experts.expert_8.adapter_up.weight"] = torch.zeros(48, 12)
    checkpoint.tensors[f"{start}.experts.expert_2.adapter_up.weight"] = torch.zeros(48, 12).bfloat16()
    with pytest.raises(ValueError, match="does not hold the model its config describes") as error:
        import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out")
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "missing: model.layers.0.self_attn.q_proj.weight",
        "missing: model.layers.1.mlp.moe_adapter.experts.expert_3.adapter_down.weight",
        "missing: model.layers.1.mlp.moe_adapter.experts.expert_3.adapter_up.weight",
        f"unexpected: {start}.experts.expert_8.adapter_up.weight",
        f"wrong shape: {start}.router.weight is [7, 48] in the file, [8, 48] by the config",
        "mixed dtypes: the experts of model.layers.0.mlp.experts.down_proj are bfloat16 and float32",
    ]


@pytest.mark.parametrize(
    "field", ["topk", "moe_scaling", "num_experts", "adapter_dim", "rms_norm_eps", "num_attention_heads"]
)
def test_no_default_stands_for_a_missing_field(field: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    del checkpoint.config[field]
    with pytest.raises(ValueError, match=f"the config lacks {field}"):
        import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out")


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.config |= {"topk": 9, "moe_scaling": "much"}
    with pytest.raises(
        ValueError, match=r"adapter_scaling \('much'\).*num_experts_per_tok \(9\) must be at most num_experts \(8\)"
    ):
        import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out")
    checkpoint.config |= {"topk": 2, "moe_scaling": 1, "hidden_size": "wide"}
    with pytest.raises(ValueError, match="the config is no llama config"):
        import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out")
    checkpoint.config |= {"hidden_size": 48, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(ValueError, match="import the unquantized checkpoint"):
        import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out")


def test_missing_files_and_other_models_are_refused(tmp_path: Path) -> None:
    source = Checkpoint().save(tmp_path / "source", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00003\.safetensors"):
        import_checkpoint(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="crafted model of this package already"):
        import_checkpoint(import_checkpoint(CAMELIDAE, tmp_path / "ours"), tmp_path / "out")
    with pytest.raises(FileExistsError):
        import_checkpoint(CAMELIDAE, tmp_path / "ours")
    dense = Checkpoint().without("moe_adapter")
    dense.config = {
        k: v for k, v in dense.config.items() if k not in ("topk", "adapter_dim", "moe_scaling", "auto_map")
    }
    dense.config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(ValueError, match="a dense model can be crafted"):
        import_checkpoint(dense.save(tmp_path / "dense"), tmp_path / "out")


def test_companions_come_along_and_code_does_not(tmp_path: Path) -> None:
    source = Checkpoint().save(tmp_path / "source")
    (source / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}, "eos": "</s>"})
    )
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (source / "LICENSE").write_text("terms")
    for name in ("modeling_camelidae.py", "setup.sh", "optimizer.pt"):
        (source / name).write_text("")
    folder = import_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos": "</s>"}
    assert "auto_map" not in (folder / "config.json").read_text()


def test_tied_embeddings_and_stored_frequencies(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.config["tie_word_embeddings"] = True
    frequencies = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    for layer in range(3):
        checkpoint.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.half()
    with pytest.raises(ValueError, match=r"untied: lm_head\.weight differs"):
        import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out")
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"]
    folder = import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert not {name for name in tensors.keys() if "lm_head" in name or "rotary" in name}  # noqa: SIM118
    assert pesc.load(folder)(tokens(1, 4)).logits.isfinite().all()
    checkpoint.config["rope_theta"] = 500.0
    with pytest.raises(ValueError, match="is not what rope_theta and rope_scaling"):
        import_checkpoint(checkpoint.save(tmp_path / "source"), tmp_path / "again")


def test_folders_of_another_machine_stay_out_and_refusals_name_the_config(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.config["_name_or_path"] = "/home/me/Camelidae-8x7B"
    out = import_checkpoint(checkpoint.save(tmp_path / "theirs"), tmp_path / "ours")
    assert "/home/me" not in (out / "config.json").read_text()
    for field, value in (("torch_dtype", "x"), ("num_experts", 2**31), ("num_hidden_layers", 10**6)):
        changed = Checkpoint()
        changed.config[field] = value
        folder = changed.save(tmp_path / field)
        with pytest.raises(ValueError, match=f"{folder / 'config.json'}") as error:
            import_checkpoint(folder, tmp_path / "none")
        assert "\n" not in str(error.value)
