"""What trains is precise whatever the base is, and moves at the rate and by the optimizer that the recipe names."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import pesc.training.train as training
from checkpoints import tiny_dense
from families import disturb
from pesc import PescConfig, craft, load, train
from pesc.crafting.lora import adapter_tensors, fold
from pesc.crafting.surgery import crafted_ffns, expert_parameters
from pesc.training.recipe import LoraSettings, Optimizer
from pesc.training.train import build_model
from runs import interrupt_after, make_recipe, metrics

BF16: dict[str, Any] = {"dtype": "bfloat16"}
IDS = torch.arange(3, 35).view(2, 16)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter.safetensors")


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_small_steps_are_kept_in_float32_and_lost_in_bfloat16(tmp_path: Path, console: Console, trained: str) -> None:
    recipe = make_recipe(tmp_path, **BF16, trained_dtype=trained, steps=1, learning_rate=1e-4)
    before = {name: p.detach().clone() for name, p in expert_parameters(build_model(recipe)).items()}
    assert {p.dtype for p in before.values()} == {getattr(torch, trained)}
    train(recipe, console)
    after = adapter(tmp_path / "run")
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, trained)}
    routers = [name for name in before if "router" in name]
    kept = sum(int((before[name] == after[name]).sum()) for name in routers)
    share = kept / sum(before[name].numel() for name in routers)
    assert share < 0.01 if trained == "float32" else share > 0.2


def test_the_moments_are_float32_on_a_bfloat16_base(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(make_recipe(tmp_path, **BF16), console)
    state = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-2" / "optimizer.pt")["state"]
    assert {moment.dtype for each in state.values() for moment in each.values()} == {torch.float32}


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("backend", ["pesc_auto", "eager", "pesc_wide_mm", "pesc_sorted_mm", "batched_mm"])
def test_float32_experts_compute_as_their_bfloat16_copies(tmp_path: Path, placement: Any, backend: str) -> None:
    model = load(tiny_dense(tmp_path / "dense"), dtype=torch.bfloat16)
    model = disturb(craft(model, PescConfig(num_experts=4, adapter_dim=8, adapter_placement=placement)))
    model.set_experts_implementation(backend)
    expected = model(IDS).logits
    for parameter in expert_parameters(model).values():
        parameter.data = parameter.data.float()
    assert torch.equal(model(IDS).logits, expected)


def test_a_loaded_adapter_computes_in_the_dtype_of_its_base(tmp_path: Path, console: Console) -> None:
    train(make_recipe(tmp_path, **BF16), console)
    model = load(tmp_path / "run", dtype=torch.bfloat16)
    assert {p.dtype for p in expert_parameters(model).values()} == {torch.bfloat16}
    assert adapter(tmp_path / "run")["model.layers.0.mlp.router.weight"].dtype is torch.float32


@pytest.mark.parametrize("part", ["router", "experts"])
def test_a_part_moves_at_its_own_rate(tmp_path: Path, console: Console, part: str) -> None:
    moved = {}
    for name, changes in {"one": {}, "own": {f"{part}_learning_rate": 1e-6}}.items():
        recipe = make_recipe(tmp_path, **changes, steps=1, folder=tmp_path / name)
        start = {name: p.detach().clone() for name, p in adapter_tensors(build_model(recipe)).items()}
        train(recipe, console)
        after = adapter(tmp_path / name)
        moved[name] = {key: float((after[key] - start[key]).abs().max()) for key in start}
    for key, distance in moved["own"].items():
        if f".{part}." in key and moved["one"][key]:
            assert 0 < distance < 1e-3 * moved["one"][key], key
        else:
            assert distance == moved["one"][key], key


@pytest.mark.parametrize("optim", get_args(Optimizer))
def test_every_optimizer_moves_what_trains(tmp_path: Path, console: Console, optim: str) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = make_recipe(tmp_path, optim=optim, steps=3)
    start = {name: p.detach().clone() for name, p in adapter_tensors(build_model(recipe)).items()}
    train(recipe, console)
    after = adapter(tmp_path / "run")
    assert all(not torch.equal(after[name], start[name]) for name in start if "lora_B" in name or "router" in name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_run_resumes_to_the_same_end(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    changes = {"quantization": kind, "dtype": dtype, "lora": LoraSettings(r=4, alpha=8, dropout=0.1)}
    linear = bitsandbytes.nn.Linear4bit if kind == "nf4" else bitsandbytes.nn.Linear8bitLt
    model = build_model(make_recipe(tmp_path, **changes))
    _, ffn = crafted_ffns(model)[0]
    assert isinstance(ffn.gate_proj.base_layer, linear)
    assert {p.dtype for p in adapter_tensors(model).values()} == {torch.float32}
    train(make_recipe(tmp_path, **changes, folder=tmp_path / "twin"), console)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(make_recipe(tmp_path, **changes), console)
    train(make_recipe(tmp_path, **changes), console)
    twin, resumed = adapter(tmp_path / "twin"), adapter(tmp_path / "run")
    assert {tensor.dtype for tensor in twin.values()} == {torch.float32}
    assert all(torch.equal(resumed[name], twin[name]) for name in twin)
    losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in ("twin", "run")]
    assert losses[0] == losses[1]
    assert load(tmp_path / "run", folded=True)(IDS).logits.isfinite().all()


def test_gradients_on_an_nf4_base_are_those_of_its_dequantized_weights(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = build_model(make_recipe(tmp_path, quantization="nf4"))
    plain = build_model(make_recipe(tmp_path))
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    assert not torch.equal(
        *(
            m.get_submodule("model.layers.0.mlp").gate_proj.weight.data.float()
            for m in (plain, load(tmp_path / "dense"))
        )
    )
    gradients = []
    for model in (quantized, plain):
        torch.manual_seed(0)
        disturb(model.train())
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in adapter_tensors(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_quantized_model_is_not_folded(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = build_model(make_recipe(tmp_path, quantization="nf4"))
    with pytest.raises(ValueError, match="load the model without quantization_config"):
        fold(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "nf4", "lora": None}, "needs lora"),
        ({"trained_dtype": "bfloat16"}, "must be float32, as model.dtype is"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(tmp_path, **changes)


@pytest.mark.parametrize("changes", [{"quantization": "int8"}, {"optim": "paged_adamw_32bit"}])
def test_a_recipe_without_bitsandbytes_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'pesc-moe\[quantized\]'"):
        training.build_model(make_recipe(tmp_path, **changes))
