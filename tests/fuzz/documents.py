"""Damage to JSON documents: syntax, keys, and values, nonsensical or valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzz.damage import ANYTHING, Rng, change_json, json_file, nested, of

_VALID: dict[str, list[Any]] = {
    "num_experts_per_tok": [1, 3],
    "topk": [1, 3],
    "adapter_scaling": [0.5],
    "moe_scaling": [0.5],
    "adapter_placement": ["parallel", "sequential"],
    "rope_theta": [5e5],
    "factor": [2.0],
    "rms_norm_eps": [1e-3],
    "hidden_act": ["gelu", "relu"],
    "num_attention_heads": [8, 2],
    "num_key_value_heads": [1, 4],
    "sliding_window": [2],
    "tie_word_embeddings": [True, False],
    "router_aux_loss_coef": [0.5],
    "norm_topk_prob": [True, False],
    "embedding_multiplier": [2.0],
    "residual_multiplier": [0.5],
    "logits_scaling": [2.0],
    "attention_multiplier": [0.1],
    "shared_intermediate_size": [24],
    "model_type": ["llama", "mistral", "qwen2", "gemma", "pesc"],
    "base_model_type": ["mistral", "qwen2"],
    "dtype": ["bfloat16", "float16", "int8"],
    "lora_alpha": [4, 16],
    "use_rslora": [True],
    "fan_in_fan_out": [True],
    "target_modules": [["q_proj"], "all-linear"],
    "chat_template": ["{{ 1 / 0 }}", "x"],
    "eos_token_id": [7],
}


@of("structure")
def json_syntax(folder: Path, rng: Rng) -> str | None:
    if (file := json_file(folder, rng)) is None:
        return None
    text = file.read_text()
    depth = rng.choice([10_000, 200_000])
    ways = {
        "not closed": text.rstrip()[:-1],
        "a list": f"[{text}]",
        "nothing": "",
        "a number": "7",
        "null": "null",
        "nested": "[" * depth + "]" * depth,
        "nested below": text.rstrip()[:-1] + ', "x": ' + '{"x":' * depth + "1" + "}" * depth + "}",
        "UTF-16": text.encode("utf-16").decode("latin1"),
        "a long number": text.rstrip()[:-1] + ', "x": ' + "9" * 5000 + "}",
    }
    way = rng.choice(list(ways))
    file.write_text(ways[way])
    return f"{file.name} is {way}"


@of("structure")
def json_value(folder: Path, rng: Rng) -> str | None:
    if (file := json_file(folder, rng)) is None:
        return None

    def change(values: Any) -> str:
        container, key = rng.choice(nested(values)[:400])
        container[key] = value = rng.choice(ANYTHING)
        return f"{key} is {value!r}"[:99]

    return change_json(file, change)


@of("structure")
def json_key_lost(folder: Path, rng: Rng) -> str | None:
    if (file := json_file(folder, rng)) is None:
        return None

    def change(values: Any) -> str:
        container, key = rng.choice([place for place in nested(values)[:400] if isinstance(place[0], dict)])
        del container[key]
        return f"without {key}"

    return change_json(file, change)


@of("structure")
def json_key_added(folder: Path, rng: Rng) -> str | None:
    if (file := json_file(folder, rng)) is None:
        return None
    keys = ["transformers_weights", "quantization_config", "auto_map", "num_experts", "num_local_experts", "pesc"]
    keys += ["adapter_dim", "base_model_type", "layer_types", "rope_scaling", "attn_implementation", "text_config"]
    keys += ["torch_dtype", "pruned_heads", "vocab_size", "head_dim", "rank_pattern", "megatron_config", "use_dora"]
    keys += ["_attn_implementation", "experts_implementation", "id2label", "num_labels", "is_encoder_decoder"]

    def change(values: Any) -> str:
        target = values["lora"] if isinstance(values.get("lora"), dict) and rng.random() < 0.5 else values
        key, value = rng.choice(keys), rng.choice([*ANYTHING, {"quant_method": "bitsandbytes"}, {"(a*)*b": 8}])
        target[key] = value
        return f"{key} is {value!r}"[:99]

    return change_json(file, change)


@of("settings")
def another_setting(folder: Path, rng: Rng) -> str | None:
    if (file := json_file(folder, rng)) is None:
        return None

    def change(values: Any) -> str | None:
        places = [(holder, key) for holder, key in nested(values) if key in _VALID]
        if not places:
            return None
        holder, key = rng.choice(places)
        old, holder[key] = holder[key], rng.choice([value for value in _VALID[key] if value != holder[key]] or [None])
        return f"{key} is {holder[key]!r}, was {old!r}"

    return change_json(file, change)
