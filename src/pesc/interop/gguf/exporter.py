"""Write crafted models as GGUF files for llama.cpp, whose architectures with a shared expert hold them exactly.

| base | architecture | how |
|---|---|---|
| Llama, Mistral, Granite, Qwen2 | `granitemoe` | Granite's multipliers are 1, or the base's own; biases are allowed |
| Qwen3 | `glm4moe` | with a softmax router; F is padded with zeros to a multiple of A, as this architecture wants |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pesc.crafting.load import ModelRef
from pesc.interop.card import licence_of
from pesc.interop.format import Format, Source, open_source
from pesc.interop.gguf.vocabulary import add_vocabulary, vocabulary_reasons
from pesc.interop.limits import Limits, head_dim_of, multipliers_of, reasons_against, setting_of
from pesc.interop.stock import scaled

Quantization = Literal["F32", "F16", "Q8_0"]
GRANITE, GLM = "granitemoe", "glm4moe"
_LIMITS = {
    GRANITE: Limits(
        bases=("llama", "mistral", "granite", "qwen2"),
        output_bias=True,
        any_head_dim=True,
        ropes=("default", "linear", "llama3"),
    ),
    GLM: Limits(bases=("qwen3",), any_head_dim=True, ropes=("default", "linear")),
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_PARTS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
} | {
    f"self_attn.{name}_proj.{kind}": f"attn_{'output' if name == 'o' else name}.{kind}"
    for name in "qkvo"
    for kind in ("weight", "bias")
}


def architecture_of(config: Any) -> str:
    """The llama.cpp architecture for a crafted model's base."""
    return GLM if config.base_model_type in _LIMITS[GLM].bases else GRANITE


def _reasons_against(ref: ModelRef) -> list[str]:
    config, known = ref.config, [base for limits in _LIMITS.values() for base in limits.bases]
    limits = _LIMITS[architecture_of(config)] if config.base_model_type in known else Limits(bases=tuple(known))
    return [*reasons_against(config, limits), *vocabulary_reasons(ref.base.folder, config.vocab_size)]


def _write(ref: ModelRef, out: Path, quantization: Quantization) -> None:
    """Write a crafted model as one GGUF file, with its tokenizer and chat template.

    Weights are read and written one at a time. Routers, norms and biases stay F32 in every file; a matrix stays F16
    in a Q8_0 file if its rows are no multiple of 32.
    """
    try:
        import gguf
    except ImportError as error:
        raise FileNotFoundError("writing GGUF files needs the package gguf: pip install gguf") from error

    source, config = open_source(ref), ref.config
    writer = gguf.GGUFWriter(path=None, arch=architecture_of(config))
    _add_general(writer, source, quantization)
    _add_shape(writer, config)
    add_vocabulary(writer, ref, config.vocab_size)
    for name, tensor in _tensors(source):
        kind = gguf.GGMLQuantizationType[_type_of(name, tensor, quantization)]
        size = math.prod(gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kind))
        writer.add_tensor_info(name, list(tensor.shape), np.dtype(np.float32), size, kind)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # The tensors are made a second time: the file begins with all their shapes, and they may not fit in memory.
    for name, tensor in _tensors(source):
        kind = gguf.GGMLQuantizationType[_type_of(name, tensor, quantization)]
        writer.write_tensor_data(gguf.quants.quantize(tensor.float().contiguous().numpy(), kind))
    writer.close()


def _add_general(writer: Any, source: Source, quantization: Quantization) -> None:
    import gguf

    kinds = gguf.LlamaFileType
    file_types = {"F32": kinds.ALL_F32, "F16": kinds.MOSTLY_F16, "Q8_0": kinds.MOSTLY_Q8_0}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(source.ref.name).name)
    writer.add_description("PESC mixture of experts (arXiv 2401.02731)")
    if licence := licence_of(source.folder):
        writer.add_license(licence)
    writer.add_file_type(file_types[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_shape(writer: Any, config: Any) -> None:
    adapter_dim, head_dim = setting_of(config, "adapter_dim"), head_dim_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(setting_of(config, "num_experts"))
    writer.add_expert_used_count(setting_of(config, "num_experts_per_tok"))
    _add_rope(writer, config)
    if architecture_of(config) == GLM:
        _add_glm(writer, config)
        return
    writer.add_feed_forward_length(adapter_dim)
    writer.add_expert_shared_feed_forward_length(config.intermediate_size)
    multipliers = multipliers_of(config)
    writer.add_attention_scale(multipliers["attention_multiplier"])
    writer.add_embedding_scale(multipliers["embedding_multiplier"])
    writer.add_residual_scale(multipliers["residual_multiplier"])
    writer.add_logit_scale(multipliers["logits_scaling"])


def _add_glm(writer: Any, config: Any) -> None:
    import gguf

    adapter_dim = setting_of(config, "adapter_dim")
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(adapter_dim)
    writer.add_expert_shared_count(math.ceil(config.intermediate_size / adapter_dim))
    writer.add_leading_dense_block_count(0)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(1.0)


def _add_rope(writer: Any, config: Any) -> None:
    import gguf

    rope = config.rope_parameters
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _type_of(name: str, tensor: torch.Tensor, quantization: Quantization) -> str:
    if tensor.dim() == 1 or "ffn_gate_inp" in name:
        return "F32"
    return "F16" if quantization == "Q8_0" and tensor.shape[-1] % 32 else quantization


def _tensors(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    config = source.config
    glm = architecture_of(config) == GLM
    if config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _rope_factors(config)
    for name in source.names:
        module, _, kind = name.rpartition(".")
        if module in _TOP:
            yield f"{_TOP[module]}.{kind}", source.read(name)
            continue
        _, _, layer, part = name.split(".", 3)
        tensors = _layer_tensors(config, part, source.read(name), glm=glm)
        yield from ((f"blk.{layer}.{theirs}", tensor) for theirs, tensor in tensors)


def _layer_tensors(config: Any, part: str, tensor: torch.Tensor, *, glm: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """What one tensor of a layer becomes; `part` is its name in the layer."""
    if part == "post_attention_layernorm.weight":
        yield f"{'post_attention' if glm else 'ffn'}_norm.weight", tensor
    elif part == "mlp.experts.gate_up_proj":
        gate, up = tensor.chunk(2, dim=1)
        yield "ffn_gate_exps.weight", gate
        yield "ffn_up_exps.weight", up
    elif part == "mlp.experts.down_proj":
        yield _PARTS[part], scaled(tensor, config.pesc_config.adapter_scaling)
    elif glm and part.startswith("mlp.") and part.endswith("_proj.weight"):
        extra = -config.intermediate_size % setting_of(config, "adapter_dim")
        yield _PARTS[part], F.pad(tensor, (0, extra) if "down" in part else (0, 0, 0, extra))
    elif not glm and part.startswith(("self_attn.q_proj", "self_attn.k_proj")):
        heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
        yield _PARTS[part], _interleaved(tensor, heads)
    else:
        yield _PARTS[part], tensor
        if glm and part == "mlp.router.weight":
            yield "exp_probs_b.bias", torch.zeros(tensor.shape[0])


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection reordered: this architecture turns neighbours, transformers turns halves."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rope_factors(config: Any) -> torch.Tensor:
    """What each frequency is divided by."""
    dim = head_dim_of(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
    scaled_frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    return plain / scaled_frequencies


GGUF = [
    Format(
        name=f"gguf-{quantization.lower()}",
        reasons_against=_reasons_against,
        write=functools.partial(_write, quantization=quantization),
        suffix=".gguf",
    )
    for quantization in get_args(Quantization)
]
