"""Make a crafted model to compare engines on: parallel + swiglu, with random experts that matter.

Usage: python engines/subject.py OUT [--base smollm2|llama|granite|qwen2|qwen3] [--rope linear|llama3|yarn]

`smollm2` is the embedded model; the others are small random models of their family, with its tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from pesc import PescConfig, craft, load, load_tokenizer
from pesc.crafting.embedded import EMBEDDED
from pesc.crafting.surgery import expert_parameters

_ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}
_RANDOM = {"llama": "Llama", "granite": "Granite", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def random_base(family: str, rope: str) -> transformers.PreTrainedModel:
    """Four layers of width 256 whose logits differ enough to tell tokens apart."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{_RANDOM[family]}Config")(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=600,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": rope, "rope_theta": 1e5} | _ROPES[rope],
        tie_word_embeddings=family != "llama",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    if family == "qwen3":
        config.head_dim = 128
    if family == "granite":
        config.residual_multiplier, config.logits_scaling = 0.5, 2.0
        config.embedding_multiplier, config.attention_multiplier = 3.0, 0.1
    model = getattr(transformers, f"{_RANDOM[family]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.2, 1.8)
    return model


def main() -> None:
    """Write the subject's folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", choices=["smollm2", *_RANDOM], default="smollm2")
    parser.add_argument("--rope", choices=_ROPES, default="default")
    arguments = parser.parse_args()
    small = arguments.base != "smollm2"
    dense = random_base(arguments.base, arguments.rope) if small else load(EMBEDDED, dtype="float32")
    method = PescConfig(
        num_experts=8,
        num_experts_per_tok=2,
        adapter_dim=64,
        adapter_placement="parallel",
        adapter_activation="swiglu",
        adapter_scaling=0.3,
    )
    model = craft(dense, method)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in expert_parameters(model).items():
            if not name.endswith("gate_up_proj"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(arguments.out)
    load_tokenizer(EMBEDDED).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
