"""Stock architectures hold a crafted model exactly, and transformers' own classes load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import pesc
from families import tokens
from pesc.interop.formats import FORMATS, export
from pesc.interop.stock import DEFAULT_FORMAT
from published import GATED, NO_WINDOW, ROPES, crafted, disturbed

# (format, base family, what differs in the dense config, the method's settings)
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("granitemoeshared", "llama", {}, {}),
    "llama, tied": ("granitemoeshared", "llama", {"tie_word_embeddings": True}, {}),
    "llama, no GQA": ("granitemoeshared", "llama", {"num_key_value_heads": 4}, {}),
    "llama, one KV head": ("granitemoeshared", "llama", {"num_key_value_heads": 1}, {}),
    "llama, theta": ("granitemoeshared", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {}),
    "llama, linear": ("granitemoeshared", "llama", {"rope_parameters": ROPES["linear"]}, {}),
    "llama, llama3": ("granitemoeshared", "llama", {"rope_parameters": ROPES["llama3"]}, {}),
    "llama, yarn": ("qwen2_moe", "llama", {"rope_parameters": ROPES["yarn"]}, {}),
    "llama, scaling 1": ("granitemoeshared", "llama", {}, {"adapter_scaling": 1.0}),
    "llama, scaling 0.3": ("qwen2_moe", "llama", {}, {"adapter_scaling": 0.3}),
    "llama, K = E": ("granitemoeshared", "llama", {}, {"num_experts": 3, "num_experts_per_tok": 3, "adapter_dim": 5}),
    "llama, K = 1": ("qwen2_moe", "llama", {}, {"num_experts": 11, "num_experts_per_tok": 1, "adapter_dim": 1}),
    "llama, lists": ("granitemoeshared", "llama", {}, {"num_experts": [4, 4, 4], "adapter_dim": [6, 6, 6]}),
    "llama in qwen2_moe": ("qwen2_moe", "llama", {}, {}),
    "llama, one layer": ("qwen2_moe", "llama", {}, {"layers": [1]}),
    "mistral": ("granitemoeshared", "mistral", NO_WINDOW, {}),
    "mistral, wide window": ("granitemoeshared", "mistral", {"sliding_window": 128}, {}),
    "mistral in qwen2_moe": ("qwen2_moe", "mistral", NO_WINDOW, {}),
    "granite": ("granitemoeshared", "granite", {"embedding_multiplier": 3.0, "attention_multiplier": 0.1}, {}),
    "qwen2, biases": ("qwen2_moe", "qwen2", {}, {}),
    "qwen2, tied": ("qwen2_moe", "qwen2", {"tie_word_embeddings": True}, {"adapter_scaling": 0.3}),
    "qwen2, two layers": ("qwen2_moe", "qwen2", {}, {"layers": [0, 2]}),
    "qwen3": ("qwen3_next", "qwen3", {}, {}),
    "qwen3, wide heads, tied": ("qwen3_next", "qwen3", {"head_dim": 16, "tie_word_embeddings": True}, {}),
    "qwen3, linear, one layer": ("qwen3_next", "qwen3", {"rope_parameters": ROPES["linear"]}, {"layers": [2]}),
}


def logits(folder: Path) -> torch.Tensor:
    # grouped_mm, the default, takes only widths whose rows are a multiple of 16 bytes.
    return pesc.load(folder, experts_implementation="eager")(tokens()).logits


def stock(folder: Path) -> torch.nn.Module:
    """The folder's model, loaded as its config says and nothing missing, unknown or misshapen."""
    values = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, values["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True, experts_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_stock_class_computes_what_we_do(name: str, tmp_path: Path) -> None:
    target, family, dense, method = CASES[name]
    ours = disturbed(tmp_path, family, dense, **method)
    expected = logits(ours)
    assert expected.std() > 0.3
    model = stock(export(ours, tmp_path / "theirs", target))
    assert model.config.model_type == target
    assert not isinstance(model, type(pesc.load(ours)))
    torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["granitemoeshared", "qwen2_moe"])
def test_greedy_text_is_the_same(target: str, tmp_path: Path) -> None:
    ours = disturbed(tmp_path, "llama", {})
    model = stock(export(ours, tmp_path / "theirs", target))
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = pesc.load(ours, experts_implementation="eager").generate(tokens(1), **settings)
    assert torch.equal(model.generate(tokens(1), **settings), expected)


def test_dense_weights_keep_their_bits_and_dtype(tmp_path: Path) -> None:
    model = crafted(tmp_path / "ours", "llama", **GATED).bfloat16()
    model.save_pretrained(tmp_path / "ours")
    theirs = export(tmp_path / "ours", tmp_path / "theirs", "granitemoeshared")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", theirs))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    kept = [name for name in before if ".mlp." not in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    layer = "model.layers.1."
    expected = before[f"{layer}mlp.experts.down_proj"] * 0.25  # a power of two: exact
    assert torch.equal(after[f"{layer}block_sparse_moe.output_linear.weight"], expected)
    assert json.loads((theirs / "config.json").read_text())["dtype"] == "bfloat16"


def test_configs_hold_what_other_programs_trip_over(tmp_path: Path) -> None:
    rope = {"rope_parameters": ROPES["llama3"]}
    ours = disturbed(tmp_path, "llama", rope)
    granite = json.loads((export(ours, tmp_path / "a", "granitemoeshared") / "config.json").read_text())
    assert (granite["rope_theta"], granite["rope_parameters"]["rope_theta"]) == (5e5, 5e5)
    assert granite["rope_scaling"]["factor"] == 8.0
    assert granite["attention_multiplier"] == 8**-0.5
    # A window or layer kinds would give vLLM's Granite attention sinks.
    assert not granite.keys() & {"layer_types", "sliding_window", "head_dim", "pesc", "base_model_type"}
    qwen2 = export(ours, tmp_path / "b", "qwen2_moe")
    values, tensors = json.loads((qwen2 / "config.json").read_text()), load_file(qwen2 / "model.safetensors")
    assert values["norm_topk_prob"] is True
    for name in "qkv":
        assert not tensors[f"model.layers.0.self_attn.{name}_proj.bias"].any()
    assert not tensors["model.layers.0.mlp.shared_expert_gate.weight"].any()


def test_an_untied_output_layer_is_written_where_vllm_wants_one(tmp_path: Path) -> None:
    ours = disturbed(tmp_path, "qwen3", {"tie_word_embeddings": True})
    theirs = export(ours, tmp_path / "theirs", "qwen3_next")
    tensors = load_file(theirs / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((theirs / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", DEFAULT_FORMAT)
def test_stock_chooses_the_architecture_of_the_family(family: str, tmp_path: Path) -> None:
    ours = disturbed(tmp_path, family, NO_WINDOW if family == "mistral" else {})
    theirs = export(ours, tmp_path / "theirs", "stock")
    assert json.loads((theirs / "config.json").read_text())["model_type"] == DEFAULT_FORMAT[family]
    assert DEFAULT_FORMAT[family] in FORMATS


REFUSED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "sequential": (
        *("granitemoeshared", "llama", {}, {"adapter_placement": "sequential", "adapter_activation": "gelu"}),
        r"its experts are sequential \+ gelu.*--format pesc",
    ),
    "gelu": ("qwen2_moe", "llama", {}, {"adapter_activation": "gelu"}, r"parallel \+ gelu.*--format pesc"),
    "other counts": ("qwen2_moe", "llama", {}, {"num_experts": [4, 2, 4]}, r"num_experts \(\[4, 2, 4\]\) differs"),
    "some layers": ("granitemoeshared", "llama", {}, {"layers": [0]}, r"only layers \[0\].*--format qwen2_moe"),
    "biased queries": ("granitemoeshared", "qwen2", {}, {}, "its base is qwen2.*--format qwen2_moe"),
    "query norms": ("qwen2_moe", "qwen3", {}, {}, "its base is qwen3.*--format qwen3_next"),
    "multipliers": ("qwen2_moe", "granite", {}, {}, "its base is granite.*--format granitemoeshared"),
    "other family": ("granitemoeshared", "gemma2", {}, {}, "its base is gemma2.*--format pesc"),
    "window": ("granitemoeshared", "mistral", {"sliding_window": 8}, {}, r"sliding_window 8.*max_position_embeddings"),
    "windows": (
        *("qwen2_moe", "qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, {}),
        "sliding_window 3",
    ),
    "biased output": ("qwen2_moe", "llama", {"attention_bias": True}, {}, r"\(attention_bias\)"),
    "biased FFN": ("granitemoeshared", "llama", {"mlp_bias": True}, {}, r"\(mlp_bias\)"),
    "activation": ("granitemoeshared", "llama", {"hidden_act": "gelu"}, {}, "hidden_act is 'gelu'"),
    "wide heads": ("granitemoeshared", "llama", {"head_dim": 16}, {}, r"head_dim \(16\).*\(8\)"),
    "rope": (
        *("granitemoeshared", "llama"),
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1] * 4,
                "long_factor": [1] * 4,
            }
        },
        *({}, "rope_type is 'longrope'"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_architecture_cannot_hold_is_refused_before_loading(name: str, tmp_path: Path) -> None:
    target, family, dense, method, reason = REFUSED[name]
    if family == "qwen2":
        dense = dense | {"layer_types": None}
    crafted(tmp_path / "ours", family, dense, **GATED | method)
    (tmp_path / "ours" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "ours", tmp_path / "theirs", target)
    assert not (tmp_path / "theirs").exists()
