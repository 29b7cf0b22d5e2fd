"""A crafted model is a good Hugging Face citizen."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, LlamaForCausalLM

from families import FAMILIES, UNTRIED, disturb, tiny_model, tokens
from pesc import PescConfig, craft, craft_checkpoint
from pesc.crafting import modeling
from pesc.crafting.adapter import save_adapter
from pesc.crafting.info import describe
from pesc.crafting.load import load
from pesc.crafting.lora import adapter_tensors, add_lora, fold
from pesc.crafting.surgery import crafted_ffns, expert_parameters

SMALL = {"num_experts": 4, "adapter_dim": 8}


def crafted_model(family: str = "llama", dtype: torch.dtype = torch.float32, **settings):
    return disturb(craft(tiny_model(family, dtype), PescConfig(**(SMALL | settings)))).eval()


@pytest.mark.parametrize("family", [*FAMILIES, *UNTRIED])
def test_a_dense_checkpoint_crafts_saves_and_loads(family: str, tmp_path: Path) -> None:
    """Also where transformers stores weights under other names than the model has (gpt_neox)."""
    dense = tiny_model(family)
    dense.save_pretrained(tmp_path / "dense")
    on_disk = set(load_file(tmp_path / "dense" / "model.safetensors"))
    crafted = disturb(
        craft(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), PescConfig(**SMALL)), seed=3
    ).eval()
    crafted.save_pretrained(tmp_path / "crafted")
    assert on_disk <= set(load_file(tmp_path / "crafted" / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "crafted")
    assert torch.equal(loaded(tokens()).logits, crafted(tokens()).logits)
    craft_checkpoint(tmp_path / "dense", tmp_path / "linked", PescConfig(**SMALL))
    linked = AutoModelForCausalLM.from_pretrained(tmp_path / "linked")
    assert torch.equal(linked(tokens()).logits, dense(tokens()).logits)
    assert describe(tmp_path / "linked").missing == []


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_bit_equal(family: str, tmp_path: Path) -> None:
    model = crafted_model(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert loaded.config.to_json_string() == model.config.to_json_string()


def test_config_keeps_dense_fields_at_the_top_and_its_own_type(tmp_path: Path) -> None:
    model = crafted_model("qwen3", num_experts=[4, 4, 2])
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["model_type"], values["base_model_type"], values["architectures"]) == (
        "pesc",
        "qwen3",
        ["PescQwen3ForCausalLM"],
    )
    assert values["hidden_size"] == 32
    assert values["pesc"]["num_experts"] == [4, 4, 2]
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.pesc_config == model.config.pesc_config
    assert (config.num_experts, config.num_experts_per_tok) == ([4, 4, 2], 2)


def test_weights_keep_their_dense_names_on_disk(tmp_path: Path) -> None:
    dense_names = {name for name, _ in tiny_model("llama").named_parameters()}
    model = crafted_model()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == dense_names | set(expert_parameters(model))


def test_without_pesc_the_auto_classes_refuse(tmp_path: Path) -> None:
    crafted_model().save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "pesc" in refused.stderr.splitlines()[-1] or "pesc" in refused.stderr
    loaded = subprocess.run([sys.executable, "-c", f"import pesc; {code}"], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize("edited", [False, True], ids=["dense class", "dense model_type"])
def test_dense_classes_refuse_a_crafted_folder(edited: bool, tmp_path: Path) -> None:
    """They would leave its experts out."""
    crafted_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    if edited:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    for kind in (LlamaForCausalLM, AutoModelForCausalLM) if edited else (LlamaForCausalLM,):
        with pytest.raises(ValueError, match="load this folder with AutoModelForCausalLM, after `import pesc`"):
            kind.from_pretrained(tmp_path)


def test_fp8_must_leave_the_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers allows FP8 with a GPU only; what is tested here runs without one too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    model = crafted_model()
    model.save_pretrained(tmp_path / "crafted")
    with pytest.raises(ValueError, match=r"FP8 would replace the experts.*modules_to_not_convert"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "crafted", quantization_config=FineGrainedFP8Config())
    kept = FineGrainedFP8Config(weight_block_size=(16, 16), modules_to_not_convert=["lm_head", "experts"])
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "crafted", quantization_config=kept, device_map={"": torch.device("cpu")}
    )
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    expected = expert_parameters(model)
    assert all(torch.equal(expected[name], p) for name, p in expert_parameters(loaded).items())


def test_import_is_cheap_and_works_before_or_after_transformers() -> None:
    code = "import pesc, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import transformers; transformers.AutoConfig; import pesc; assert 'pesc' in transformers.CONFIG_MAPPING"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_checkpoints_list_every_mismatch_at_once(tmp_path: Path) -> None:
    crafted_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.up_proj"], tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.2.mlp.router.weight"] = torch.zeros(5, 32)
    tensors["model.layers.0.mlp.experts.extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="does not hold this crafted model") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    message = str(error.value)
    assert "missing: model.layers.1.mlp.experts.up_proj" in message
    assert "missing: model.layers.0.self_attn.q_proj.weight" in message
    assert "unexpected: model.layers.0.mlp.experts.extra" in message
    assert "wrong shape: model.layers.2.mlp.router.weight is [5, 32] in the file, [4, 32] by the config" in message


def test_bad_configs_are_refused(tmp_path: Path) -> None:
    crafted_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"pesc": good["pesc"] | {"num_expert": 3}}))
    with pytest.raises(ValueError, match=r"num_expert is unknown \(did you mean num_experts\?"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    path.write_text(json.dumps(good | {"base_model_type": "lama"}))
    with pytest.raises(ValueError, match=r"base_model_type \('lama'\) must be"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "backend", ["eager", "batched_mm", "grouped_mm", "pesc_wide_mm", "pesc_token_mm", "pesc_sorted_mm", "pesc_auto"]
)
def test_backends_are_chosen_by_name(backend: str, tmp_path: Path) -> None:
    model = crafted_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=backend)
    assert loaded.config._experts_implementation == backend
    assert torch.allclose(loaded(tokens()).logits, model(tokens()).logits, atol=1e-5)
    model.set_experts_implementation(backend)
    assert crafted_ffns(model)[0][1].experts.config._experts_implementation == backend


def test_dtype_and_device_map(tmp_path: Path) -> None:
    crafted_model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_the_full_forward(family: str) -> None:
    model = crafted_model(family)
    prompt = tokens(length=6)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    full = model(out).logits
    assert torch.equal(out[:, 6:], full[:, 5:-1].argmax(-1))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_padded_batches_generate_what_each_row_alone_does(family: str) -> None:
    model = crafted_model(family)
    short, long = tokens(1, 4, seed=1), tokens(1, 9, seed=2)
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), long])
    mask = (padded != 0).long()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **settings)[:, 9:]
    for row, prompt in zip(together, (short, long), strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :]
        assert torch.equal(row, alone)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["batched_mm", "grouped_mm", "pesc_wide_mm", "pesc_auto"])
def test_compiles_without_graph_breaks_in_our_layer(backend: str) -> None:
    model = crafted_model()
    model.set_experts_implementation(backend)
    _, ffn = crafted_ffns(model)[0]
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(ffn, fullgraph=True)
    assert torch.allclose(compiled(x), ffn(x), atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *UNTRIED])
def test_classes_are_found_by_their_names(family: str) -> None:
    made = type(crafted_model(family))
    assert getattr(modeling, made.__name__) is made
    assert pickle.loads(pickle.dumps(made)) is made
    with pytest.raises(AttributeError, match="has no attribute 'PescNothing'"):
        _ = modeling.PescNothing


def test_peft_finds_the_class_of_an_adapters_base(tmp_path: Path) -> None:
    crafted_model().save_pretrained(tmp_path / "crafted")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "crafted")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["pesc"])
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("adapter", "name", "message"),
    [
        (LoraConfig(target_modules=["q_proj"]), "mine", r"its name \('mine'\) must be 'default'"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), None, "modules_to_save must be left out"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_4"), None, "changes the base's weights"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), None, "IA3Config must be a LoraConfig"),
    ],
    ids=["name", "modules_to_save", "initialisation", "kind"],
)
def test_adapters_that_could_not_be_saved_are_refused_at_once(adapter, name: str | None, message: str) -> None:
    model = crafted_model()
    with pytest.raises(ValueError, match=message):
        model.add_adapter(adapter, name)


def test_a_folded_model_is_not_its_old_base(tmp_path: Path) -> None:
    crafted_model().save_pretrained(tmp_path / "crafted")
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = add_lora(load(tmp_path / "crafted"), lora)
    save_adapter(model, tmp_path / "adapter")
    for tuned in (model, load(tmp_path / "adapter")):
        with pytest.raises(ValueError, match="was not loaded from anywhere: save its base"):
            save_adapter(add_lora(fold(tuned), lora), tmp_path / "next")


def test_a_state_dict_of_the_adapter_is_complete() -> None:
    """A trainer's checkpoint holds no base; one that lacks experts is reported."""
    model = add_lora(crafted_model(), LoraConfig(target_modules=["q_proj"]))
    held = adapter_tensors(model)
    assert model.load_state_dict(held, strict=False).missing_keys == []
    held.popitem()
    assert len(model.load_state_dict(held, strict=False).missing_keys) > 1


def test_config_survives_pickle_and_copies() -> None:
    model = crafted_model()
    for copied in (pickle.loads(pickle.dumps(model.config)), copy.deepcopy(model.config)):
        assert type(copied) is type(model.config)
        assert copied.to_dict() == model.config.to_dict()
        assert copied._attn_implementation == model.config._attn_implementation
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits)
