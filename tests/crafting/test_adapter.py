"""The adapter folder: one home for LoRA and experts, strict to load, exact to fold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import pesc
from checkpoints import tiny_dense, without_sums
from families import disturb
from pesc import PescConfig, craft
from pesc.crafting.cost import count_parameters
from pesc.crafting.load import load
from pesc.crafting.lora import adapter_tensors
from pesc.crafting.surgery import expert_parameters

IDS = torch.arange(3, 14).unsqueeze(0)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def tuned(base: Path, method: PescConfig | None = PescConfig(num_experts=4, adapter_dim=8)):  # noqa: B008
    """A model with random experts and LoRA."""
    model = load(base)
    if method is not None:
        disturb(craft(model, method))
    pesc.add_lora(model, LORA)
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def test_saved_and_loaded_with_one_call(tmp_path: Path) -> None:
    model = tuned(tiny_dense(tmp_path / "dense"))
    pesc.save_adapter(model, tmp_path / "adapter")
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir()) == [
        "SHA256SUMS",
        "adapter.json",
        "adapter.safetensors",
    ]
    assert torch.equal(pesc.load(tmp_path / "adapter")(IDS).logits, model(IDS).logits)


def test_dense_models_with_lora_save_and_load_the_same_way(tmp_path: Path) -> None:
    model = tuned(tiny_dense(tmp_path / "dense"), method=None)
    pesc.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(pesc.load(tmp_path / "adapter")(IDS).logits, model(IDS).logits)


def test_every_tensor_is_stored_once_and_no_dense_weight(tmp_path: Path) -> None:
    model = tuned(tiny_dense(tmp_path / "dense"))
    pesc.save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter.safetensors")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(stored) == trainable == set(adapter_tensors(model))
    assert sum(t.numel() for t in stored.values()) == count_parameters(model).trained


def test_only_lora_routers_and_experts_train_and_are_held_once(tmp_path: Path) -> None:
    model = tuned(tiny_dense(tmp_path / "dense"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not any("lora_" in name or "experts" in name or "router" in name for name in frozen)
    storages = [p.data_ptr() for p in model.parameters()]
    assert len(storages) == len(set(storages))


@pytest.mark.parametrize("method", [PescConfig(num_experts=4, adapter_dim=8), None], ids=["pesc", "dense"])
def test_folded_models_compute_the_same_and_stand_alone(tmp_path: Path, method: PescConfig | None) -> None:
    model = tuned(tiny_dense(tmp_path / "dense"), method)
    before = model(IDS).logits
    with torch.no_grad():
        expected = {
            name: module.base_layer.weight + module.get_delta_weight("default")
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    folded = pesc.fold(model)
    assert all(torch.equal(folded.get_submodule(name).weight, weight) for name, weight in expected.items())
    assert torch.allclose(folded(IDS).logits, before, atol=1e-5)
    folded.save_pretrained(tmp_path / "alone")
    assert torch.equal(pesc.load(tmp_path / "alone")(IDS).logits, folded(IDS).logits)


def test_save_pretrained_of_an_unfolded_model_writes_the_adapter(tmp_path: Path) -> None:
    model = tuned(tiny_dense(tmp_path / "dense"))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(pesc.load(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_what_trains_is_kept_in_float32(tmp_path: Path) -> None:
    model = pesc.add_lora(
        craft(load(tiny_dense(tmp_path / "dense"), dtype="bfloat16"), PescConfig(num_experts=4, adapter_dim=8)),
        LORA,
    )
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    pesc.save_adapter(model, tmp_path / "adapter")
    loaded = pesc.load(tmp_path / "adapter", dtype="bfloat16")
    dtypes = {"lora_" in name: p.dtype for name, p in loaded.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert {p.dtype for p in pesc.fold(model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save must be left out"),
        ({"bias": "all"}, r"bias \('all'\) must be 'none'"),
        ({"target_modules": ["embed_tokens"]}, "must not name the embeddings"),
    ],
)
def test_lora_that_could_not_be_saved_or_folded_is_refused(tmp_path: Path, lora: dict, message: str) -> None:
    model = load(tiny_dense(tmp_path / "dense"))
    with pytest.raises(ValueError, match=message):
        pesc.add_lora(model, LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | lora)))


def test_wrapped_and_nameless_models_are_refused(tmp_path: Path) -> None:
    model = load(tiny_dense(tmp_path / "dense"))
    with pytest.raises(ValueError, match=r"wraps the model: give LoRA to the model itself with pesc.add_lora"):
        pesc.save_adapter(get_peft_model(model, LORA), tmp_path / "out")
    model = pesc.add_lora(load(tmp_path / "dense"), LORA)
    model.config.name_or_path = ""
    with pytest.raises(ValueError, match="was not loaded from anywhere"):
        pesc.save_adapter(model, tmp_path / "out")


def test_a_base_that_moved_is_named_and_found_again(tmp_path: Path) -> None:
    model = tuned(tiny_dense(tmp_path / "dense"))
    pesc.save_adapter(model, str(tmp_path / "adapter"))
    (tmp_path / "dense").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"needs its base .*pesc.load\(…, base=…\)"):
        pesc.load(tmp_path / "adapter")
    assert torch.equal(pesc.load(tmp_path / "adapter", base=tmp_path / "moved")(IDS).logits, model(IDS).logits)


def test_a_base_whose_config_computes_something_else_is_refused(tmp_path: Path) -> None:
    base = tiny_dense(tmp_path / "dense")
    pesc.save_adapter(tuned(base), tmp_path / "adapter")
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"transformers_version": "5.0.0", "architectures": None}))
    pesc.load(tmp_path / "adapter")
    (base / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"with config.json of sha256 .* needs the config.json it was trained on"):
        pesc.load(tmp_path / "adapter")


def test_modules_chosen_by_a_regular_expression_are_kept_by_name(tmp_path: Path) -> None:
    model = load(tiny_dense(tmp_path / "dense"))
    rule = {"target_modules": r".*layers\.1\..*(q|v)_proj", "rank_pattern": {r".*\.q_.*": 2}}
    pesc.add_lora(model, LoraConfig(r=4, lora_alpha=8, **rule))
    pesc.save_adapter(model, tmp_path / "adapter")
    lora = json.loads((tmp_path / "adapter" / "adapter.json").read_text())["lora"]
    names = [f"model.layers.1.self_attn.{part}_proj" for part in "qv"]
    assert (lora["target_modules"], lora["rank_pattern"]) == (names, {names[0]: 2})
    assert torch.equal(pesc.load(tmp_path / "adapter")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "lora", [{"target_modules": "(.*a*)*b"}, {"rank_pattern": {"(a*)*b": 2}}, {"r": 0}, {"unknown": 1}, {"r": "x"}]
)
def test_lora_settings_that_make_no_sense_are_named(tmp_path: Path, lora: dict) -> None:
    pesc.save_adapter(tuned(tiny_dense(tmp_path / "dense")), tmp_path / "adapter")
    file = without_sums(tmp_path / "adapter") / "adapter.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"lora": values["lora"] | lora}))
    with pytest.raises(ValueError, match=r"adapter\.json") as error:
        pesc.load(tmp_path / "adapter")
    assert len(str(error.value).splitlines()) == 1


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    pesc.save_adapter(tuned(tiny_dense(tmp_path / "dense")), tmp_path / "adapter")
    without_sums(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter.json").write_text('{"pesc": null}')
    with pytest.raises(ValueError, match="lacks base_model, base_sha256, base_config_sha256, lora"):
        pesc.load(tmp_path / "adapter")


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny_dense(tmp_path / "dense")
    pesc.save_adapter(tuned(base), tmp_path / "adapter")
    tiny_dense(base, seed=1)
    with pytest.raises(ValueError, match=r"was trained on .* needs the weights it was trained on"):
        pesc.load(tmp_path / "adapter")


def test_mismatches_are_listed_together(tmp_path: Path) -> None:
    pesc.save_adapter(tuned(tiny_dense(tmp_path / "dense")), tmp_path / "adapter")
    file = without_sums(tmp_path / "adapter") / "adapter.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.down_proj"]
    tensors["model.layers.0.mlp.router.weight"] = torch.zeros(3, 32)
    tensors["surprise"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not hold the model its adapter.json") as error:
        pesc.load(tmp_path / "adapter")
    for line in (
        "missing: model.layers.1.mlp.experts.down_proj",
        "unexpected: surprise",
        "wrong shape: model.layers.0",
    ):
        assert line in str(error.value)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    pesc.save_adapter(tuned(tiny_dense(tmp_path / "dense")), tmp_path / "adapter")
    file = without_sums(tmp_path / "adapter") / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged or truncated"):
        pesc.load(tmp_path / "adapter")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter.safetensors"):
        pesc.load(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match="no valid JSON"):
        pesc.load(tmp_path / "adapter")


def test_a_crafted_folder_is_a_base_too(tmp_path: Path) -> None:
    crafted = disturb(craft(load(tiny_dense(tmp_path / "dense")), PescConfig(num_experts=4, adapter_dim=8)))
    crafted.save_pretrained(tmp_path / "crafted")
    model = tuned(tmp_path / "crafted", method=None)
    pesc.save_adapter(model, tmp_path / "adapter")
    assert set(expert_parameters(model)) <= set(load_file(tmp_path / "adapter" / "adapter.safetensors"))
    assert torch.equal(pesc.load(tmp_path / "adapter")(IDS).logits, model(IDS).logits)


def test_lora_that_is_not_finite_is_not_folded_and_its_folder_named(tmp_path: Path) -> None:
    folder = pesc.save_adapter(tuned(tiny_dense(tmp_path / "dense")), tmp_path / "adapter")
    tensors = load_file(folder / "adapter.safetensors")
    next(tensor for name, tensor in tensors.items() if "lora_A" in name).fill_(float("nan"))
    save_file(tensors, folder / "adapter.safetensors")
    without_sums(folder)
    with pytest.raises(ValueError, match=rf"^{folder} cannot be folded into {tmp_path / 'dense'}: NaNs detected"):
        pesc.crafting.load.locate(folder).load(folded=True)
