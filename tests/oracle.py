"""The published layouts' forward, written out plainly from the paper and their keys: the slow twin of an import."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def logits(config: dict[str, Any], tensors: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of a checkpoint in fp64, one expert and one token's choice at a time.

    Args:
        config: a foreign config with `sliding_window`, where it has one, in force from layer `max_window_layers` on.
        tensors: by their foreign keys; query, key and value biases where there are some.
        input_ids: [B, S].
    """
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    x_BSD = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        part = {k.removeprefix(f"model.layers.{layer}."): v for k, v in weights.items() if f".layers.{layer}." in k}
        x_BSD = x_BSD + _attention(config, part, _norm(config, x_BSD, part["input_layernorm.weight"]), layer)
        x_BSD = x_BSD + _experts(config, part, _norm(config, x_BSD, part["post_attention_layernorm.weight"]))
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return _norm(config, x_BSD, weights["model.norm.weight"]) @ weights[head].T


def _norm(config: dict[str, Any], x_BSD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    return weight_D * x_BSD / (x_BSD.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def _attention(config: dict[str, Any], part: dict[str, torch.Tensor], x_BSD: torch.Tensor, layer: int) -> torch.Tensor:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, length = config["hidden_size"] // heads, x_BSD.shape[1]

    def project(name: str, count: int) -> torch.Tensor:
        bias = part.get(f"self_attn.{name}_proj.bias")
        return (
            F.linear(x_BSD, part[f"self_attn.{name}_proj.weight"], bias).unflatten(-1, (count, width)).transpose(1, 2)
        )

    scaling = (config.get("rope_scaling") or {}).get("factor", 1.0)
    frequencies = config.get("rope_theta", 10000.0) ** -(torch.arange(0, width, 2).double() / width)
    angles_SW = torch.outer(torch.arange(length).double() / scaling, frequencies).repeat(1, 2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        turned = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1)
        return x * angles_SW.cos() + turned * angles_SW.sin()

    query, key = turn(project("q", heads)), turn(project("k", kv_heads))
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, project("v", kv_heads)))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = distance < 0
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and layer >= config.get("max_window_layers", 0):
        hidden |= distance >= window
    scores = (query @ key.transpose(2, 3) / width**0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2) @ part["self_attn.o_proj.weight"].T


def _experts(config: dict[str, Any], part: dict[str, torch.Tensor], x_BSD: torch.Tensor) -> torch.Tensor:
    gate, up, down = (part[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    shared_TD = ((F.silu(x_BSD @ gate.T) * (x_BSD @ up.T)) @ down.T).flatten(0, 1)
    router_TE = (x_BSD @ part["mlp.moe_adapter.router.weight"].T).flatten(0, 1)
    prefix = "expert_" if "mlp.moe_adapter.experts.expert_0.adapter_up.weight" in part else ""
    out_TD = torch.zeros_like(shared_TD)
    for token, logits_E in enumerate(router_TE):
        chosen = logits_E.topk(config["topk"])
        for weight, expert in zip(chosen.values.softmax(0), chosen.indices.tolist(), strict=True):
            start, h_D = f"mlp.moe_adapter.experts.{prefix}{expert}.adapter", shared_TD[token]
            inner_A = F.gelu(part[f"{start}_down.weight"] @ h_D)
            out_TD[token] += weight * (h_D + config["moe_scaling"] * (part[f"{start}_up.weight"] @ inner_A))
    return out_TD.view_as(x_BSD)
