"""Crafting: identity at birth for every family, refusals that say what was found."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

from families import FAMILIES, UNTRIED, disturb, tiny_model, tokens
from pesc import PescConfig, craft
from pesc.crafting.surgery import crafted_ffns, expert_parameters

SMALL = {"num_experts": 4, "adapter_dim": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*FAMILIES, *UNTRIED])
def test_identity_at_birth(family: str, dtype: torch.dtype) -> None:
    dense = tiny_model(family, dtype)
    for settings in ({}, {"adapter_placement": "parallel", "adapter_activation": "swiglu"}):
        crafted = craft(copy.deepcopy(dense), PescConfig(**SMALL, **settings))
        assert torch.equal(crafted(tokens()).logits, dense(tokens()).logits)
        assert len(crafted_ffns(crafted)) == 3
        assert not torch.equal(disturb(crafted)(tokens()).logits, dense(tokens()).logits)


def test_crafting_copies_no_weight_and_renames_none() -> None:
    dense = tiny_model("llama")
    before = {name: p.data_ptr() for name, p in dense.named_parameters()}
    crafted = craft(dense, PescConfig(**SMALL))
    assert crafted is dense
    after = {name: p.data_ptr() for name, p in crafted.named_parameters()}
    assert before.items() <= after.items()
    assert set(after) - set(before) == set(expert_parameters(crafted))


def test_new_parameters_are_as_many_as_the_paper_counts() -> None:
    crafted = craft(tiny_model("llama"), PescConfig(num_experts=4, adapter_dim=8))
    added = sum(p.numel() for p in expert_parameters(crafted).values())
    assert added == 3 * (4 * 2 * 32 * 8 + 4 * 32)


def test_dtype_follows_the_model() -> None:
    crafted = craft(tiny_model("llama", torch.bfloat16), PescConfig(**SMALL))
    assert {p.dtype for p in expert_parameters(crafted).values()} == {torch.bfloat16}


def test_layers_and_values_per_layer() -> None:
    config = PescConfig(num_experts=[4, 6], num_experts_per_tok=[1, 2], adapter_dim=[8, 16], layers=[0, 2])
    crafted = craft(tiny_model("llama"), config)
    assert [name for name, _ in crafted_ffns(crafted)] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert [tuple(ffn.experts.down_proj.shape) for _, ffn in crafted_ffns(crafted)] == [
        (4, 32, 8),
        (6, 32, 16),
    ]


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("family", ["llama", "starcoder2", "gpt_neox"])
def test_crafted_ffn_computes_equation_7(family: str, placement: str) -> None:
    """sum_i R_i (h + s a_i(.)) with a copy of h for each expert, as the paper writes it, gives the same."""
    dense = tiny_model(family)
    crafted = disturb(
        craft(copy.deepcopy(dense), PescConfig(**SMALL, adapter_placement=placement, adapter_scaling=0.25))
    )
    name, ffn = crafted_ffns(crafted)[1]
    x_TD = torch.randn(9, 32)
    h_TD = dense.get_submodule(name)(x_TD)
    logits = x_TD @ ffn.router.weight.T
    kept = torch.full_like(logits, float("-inf")).scatter(1, logits.topk(2).indices, logits.topk(2).values)
    weights_TE = kept.softmax(-1)
    read = h_TD if placement == "sequential" else x_TD
    expected = torch.zeros_like(h_TD)
    for expert in range(4):
        inner = torch.nn.functional.gelu(read @ ffn.experts.up_proj[expert].T)
        expected += weights_TE[:, expert, None] * (h_TD + 0.25 * inner @ ffn.experts.down_proj[expert].T)
    assert torch.allclose(ffn(x_TD), expected, atol=1e-5)


def test_dropout_only_while_training() -> None:
    crafted = disturb(craft(tiny_model("llama"), PescConfig(**SMALL, adapter_dropout=0.5)))
    assert torch.equal(crafted(tokens()).logits, crafted(tokens()).logits)
    crafted.train()
    assert not torch.equal(crafted(tokens()).logits, crafted(tokens()).logits)


def test_moe_models_are_refused() -> None:
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(ValueError, match=r"already a Mixture of Experts \(mixtral: num_local_experts = 8\)"):
        craft(transformers.MixtralForCausalLM(config))
    with pytest.raises(ValueError, match="already crafted"):
        craft(craft(tiny_model("llama"), PescConfig(**SMALL)))


def test_a_family_without_ffn_modules_is_refused_with_what_was_found() -> None:
    config = transformers.OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    with pytest.raises(ValueError, match=r"searched model.decoder.layers.0 .*Found: self_attn .*fc1"):
        craft(transformers.OPTForCausalLM(config))


def test_only_causal_lms_are_crafted() -> None:
    with pytest.raises(ValueError, match=r"needs a causal LM of transformers.*LlamaModel"):
        craft(tiny_model("llama").model)


def test_a_failed_craft_leaves_the_model_dense() -> None:
    dense = tiny_model("llama")
    with pytest.raises(ValueError, match="layers"):
        craft(dense, PescConfig(layers=[9]))
    assert not crafted_ffns(dense)
    assert dense.config.model_type == "llama"


def test_models_with_device_hooks_run_their_experts() -> None:
    """accelerate's hooks stand in front of a module's class; crafting must get behind them."""
    dense = tiny_model("llama")
    for name, module in dense.named_modules():
        if not list(module.children()) or name == "model.layers.0.mlp":
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    before = dense(tokens()).logits
    crafted = craft(dense, PescConfig(**SMALL))
    assert torch.equal(crafted(tokens()).logits, before)
    assert len(crafted(tokens(), output_router_logits=True).router_logits) == 3
    assert not torch.equal(disturb(crafted)(tokens()).logits, before)


def test_a_forward_replaced_by_others_is_refused() -> None:
    dense = tiny_model("llama")
    dense.model.layers[1].mlp.forward = dense.model.layers[1].mlp.forward
    with pytest.raises(ValueError, match="has a forward of its own"):
        craft(dense, PescConfig(**SMALL))


def test_crafted_models_pickle_whole() -> None:
    crafted = disturb(craft(tiny_model("llama"), PescConfig(**SMALL)))
    restored = pickle.loads(pickle.dumps(crafted))
    assert type(restored) is type(crafted)
    assert torch.equal(restored(tokens()).logits, crafted(tokens()).logits)


def test_an_adapter_of_peft_does_not_take_the_dense_folder_for_its_base(tmp_path: Path) -> None:
    """That folder has no experts."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    crafted = disturb(craft(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), PescConfig(**SMALL)))
    copied = copy.deepcopy(crafted)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(crafted, lora)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="crafted in memory, saved nowhere: pass the model itself"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copied, tmp_path / "adapter")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
