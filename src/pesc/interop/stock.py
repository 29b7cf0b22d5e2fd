"""Write crafted models as stock architectures: mixtures of experts with a shared expert, known to other programs.

Where the adapters read the FFN's input and are gated (parallel + swiglu), y = F(x) + s * sum_i R_i(x) a_i(x) is a
mixture of small experts s * a_i beside a shared expert F. Three architectures of transformers hold it exactly:

| format | bases | how |
|---|---|---|
| `granitemoeshared` | Llama, Mistral, Granite | as it stands; Granite's multipliers are 1, or the base's own |
| `qwen2_moe` | Qwen2, Llama, Mistral | the shared expert is gated by sigmoid(0) = 1/2, so its last matrix is doubled |
| `qwen3_next` | Qwen3 | so is the attention's output; norms are stored less 1, as it adds 1; never tied |
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pesc.crafting.load import ModelRef
from pesc.interop.format import Format, Source, open_source
from pesc.interop.limits import Limits, crafted_layers, head_dim_of, multipliers_of, reasons_against, setting_of
from pesc.storage.files import write_json
from pesc.storage.weights import SHARD_BYTES, ShardWriter

DEFAULT_FORMAT = {
    "granite": "granitemoeshared",
    "llama": "granitemoeshared",
    "mistral": "granitemoeshared",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_next",
}
"""The architecture of `--format stock` for each dense family: the one that most engines were seen to run."""
_COMMON_FIELDS = (
    *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_size", "initializer_range"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id"),
    *("rms_norm_eps", "tie_word_embeddings", "use_cache", "vocab_size"),
)


def _write(ref: ModelRef, out: Path, model_type: str) -> None:
    """Write a crafted model as a stock architecture; no code of ours is needed to load it.

    Weights are read and written one at a time. Their values stay, but for adapter_scaling, which is multiplied into
    the experts' last matrices, and for the changes in the table above; both in fp32, rounded to the weights' dtype.
    """
    source, (tensors, values) = open_source(ref), _WRITERS[model_type]
    dtype = str(source.read(source.names[0]).dtype).removeprefix("torch.")
    writer = ShardWriter(out, SHARD_BYTES)
    for name, tensor in tensors(source):
        writer.add(name, tensor)
    writer.finish()
    # Programs disagree on the name of this field.
    config = _common_config(source.config) | values(source.config) | {"dtype": dtype, "torch_dtype": dtype}
    write_json(out / "config.json", config, sort_keys=True)
    ref.copy_companions(out)


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """A tensor times a number, computed in fp32, in the tensor's own dtype."""
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)


def _common_config(config: Any) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in _COMMON_FIELDS if hasattr(config, name)}
    rope = dict(config.rope_parameters)
    values |= {"hidden_act": "silu", "rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        # Older programs know only this field; the same values stand in both.
        values["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return values | {
        "num_experts_per_tok": setting_of(config, "num_experts_per_tok"),
        "router_aux_loss_coef": config.pesc_config.router_aux_loss_coef,
    }


def _granite_config(config: Any) -> dict[str, Any]:
    return multipliers_of(config) | {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "attention_bias": False,
        "intermediate_size": setting_of(config, "adapter_dim"),
        "model_type": "granitemoeshared",
        "num_local_experts": setting_of(config, "num_experts"),
        "shared_intermediate_size": config.intermediate_size,
    }


def _qwen_config(config: Any) -> dict[str, Any]:
    crafted = crafted_layers(config)
    return {
        "decoder_sparse_step": 1,
        "intermediate_size": config.intermediate_size,
        "mlp_only_layers": [layer for layer in range(config.num_hidden_layers) if layer not in crafted],
        "moe_intermediate_size": setting_of(config, "adapter_dim"),
        "norm_topk_prob": True,
        "num_experts": setting_of(config, "num_experts"),
        "shared_expert_intermediate_size": config.intermediate_size,
    }


def _qwen2_config(config: Any) -> dict[str, Any]:
    return _qwen_config(config) | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "qkv_bias": True,
        "use_sliding_window": False,
    }


def _qwen3_config(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters) | {"partial_rotary_factor": 1.0}
    return _qwen_config(config) | {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "full_attention_interval": 1,
        # Settings of linear attention, unused here; mlx-lm does not read the config without them.
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "head_dim": head_dim_of(config),
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "model_type": "qwen3_next",
        "partial_rotary_factor": 1.0,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }


def _granite_tensors(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    for name in source.names:
        start, _, part = name.rpartition("mlp.")
        if not start:
            yield name, source.read(name)
        elif part == "gate_proj.weight":
            pair = [source.read(name), source.read(f"{start}mlp.up_proj.weight")]
            yield f"{start}shared_mlp.input_linear.weight", torch.cat(pair)
        elif part == "down_proj.weight":
            yield f"{start}shared_mlp.output_linear.weight", source.read(name)
        elif part == "router.weight":
            yield f"{start}block_sparse_moe.router.layer.weight", source.read(name)
        elif part == "experts.gate_up_proj":
            yield f"{start}block_sparse_moe.input_linear.weight", source.read(name)
        elif part == "experts.down_proj":
            last = scaled(source.read(name), source.config.pesc_config.adapter_scaling)
            yield f"{start}block_sparse_moe.output_linear.weight", last


def _qwen2_tensors(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in _qwen_tensors(source):
        yield name, tensor
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and bias not in source.names:
            # vLLM leaves absent tensors unset, and computes NaN with them.
            yield bias, tensor.new_zeros(tensor.shape[0])


def _qwen3_tensors(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    heads = source.config.num_attention_heads
    for name, tensor in _qwen_tensors(source):
        if name.endswith("norm.weight"):
            yield name, tensor.float() - 1
        elif name.endswith("q_proj.weight"):
            query = tensor.unflatten(0, (heads, -1))
            yield name, torch.cat([query, torch.zeros_like(query)], dim=1).flatten(0, 1)
        elif name.endswith("o_proj.weight"):
            yield name, scaled(tensor, 2.0)
        else:
            yield name, tensor
    if source.config.tie_word_embeddings:
        # vLLM's class does not tie: without a matrix of its own the output layer would be left unset there.
        yield "lm_head.weight", source.read("model.embed_tokens.weight").clone()


def _qwen_tensors(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    crafted = {f"model.layers.{layer}." for layer in crafted_layers(source.config)}
    for name in source.names:
        start, _, part = name.rpartition("mlp.")
        if start not in crafted:
            yield name, source.read(name)
        elif part == "router.weight":
            router = source.read(name)
            yield f"{start}mlp.gate.weight", router
            yield f"{start}mlp.shared_expert_gate.weight", router.new_zeros(1, router.shape[1])
        elif part == "experts.gate_up_proj":
            for number, matrix in enumerate(source.read(name)):
                gate, up = matrix.chunk(2)
                yield f"{start}mlp.experts.{number}.gate_proj.weight", gate.clone()
                yield f"{start}mlp.experts.{number}.up_proj.weight", up.clone()
        elif part == "experts.down_proj":
            for number, matrix in enumerate(scaled(source.read(name), source.config.pesc_config.adapter_scaling)):
                yield f"{start}mlp.experts.{number}.down_proj.weight", matrix.clone()
        else:
            yield f"{start}mlp.shared_expert.{part}", scaled(source.read(name), 2.0 if "down" in part else 1.0)


_WRITERS = {
    "granitemoeshared": (_granite_tensors, _granite_config),
    "qwen2_moe": (_qwen2_tensors, _qwen2_config),
    "qwen3_next": (_qwen3_tensors, _qwen3_config),
}
_LIMITS = {
    "granitemoeshared": Limits(bases=("llama", "mistral", "granite")),
    "qwen2_moe": Limits(bases=("qwen2", "llama", "mistral"), some_layers=True),
    "qwen3_next": Limits(bases=("qwen3",), any_head_dim=True, some_layers=True),
}
STOCK = [
    Format(
        name=name,
        reasons_against=lambda ref, limits=limits: reasons_against(ref.config, limits),  # type: ignore[misc]
        write=functools.partial(_write, model_type=name),
    )
    for name, limits in _LIMITS.items()
]
