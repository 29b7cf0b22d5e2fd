"""The layouts of the published checkpoints: their keys, their configs, and ours for them.

| layout | base | key of an expert's matrix |
|---|---|---|
| Camelidae | Llama | `model.layers.N.mlp.moe_adapter.experts.expert_I.adapter_{down,up}.weight` |
| Qwen2idae | Qwen2 | as Camelidae |
| Sparsetral | Mistral | `model.layers.N.mlp.moe_adapter.experts.I.adapter_{down,up}.weight` |

Router: `model.layers.N.mlp.moe_adapter.router.weight`. `adapter_down` of all experts, stacked, is our
`model.layers.N.mlp.experts.up_proj` [E, A, D]; `adapter_up` is `experts.down_proj` [E, D, A].
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING

from pesc.config import PescConfig
from pesc.crafting.configuration import PescModelConfig, crafted_config
from pesc.crafting.refusals import refused_in_one_line
from pesc.crafting.surgery import crafted_ffns
from pesc.interop.places import public_values

BASES = {"camelidae": "llama", "qwen2idae": "qwen2", "sparsetral": "mistral"}
_BY_BASE = {base: name for name, base in BASES.items()}
METHOD_FIELDS = {
    "num_experts": "num_experts",
    "topk": "num_experts_per_tok",
    "adapter_dim": "adapter_dim",
    "moe_scaling": "adapter_scaling",
}
TRAINING_FIELDS = ("adapter_dropout", "router_aux_loss_coef")
"""Fields that only training reads; the paper's values replace absent ones."""
SOURCE = "imported_from"
"""The field of our config that keeps the published one, so that an export gives it back."""
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.moe_adapter\.experts\.(expert_|)(\d+)\.adapter_(down|up)\.weight")
NAMES = re.compile("camelidae|qwen2idae|sparsetral", re.IGNORECASE)
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
"""What the classes of a dense family begin with, by model_type."""
# Fields that change the result without changing any tensor's shape, or that promise what must be there.
_REQUIRED = (
    *METHOD_FIELDS,
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)
_NOT_DENSE = (
    *METHOD_FIELDS,
    *TRAINING_FIELDS,
    *("moe_dtype", "lora_r", "lora_alpha", "architectures", "auto_map", "model_type", "transformers_version"),
    *("_name_or_path", "torch_dtype", "dtype", SOURCE),
)


@dataclass(frozen=True)
class Layout:
    """One published layout."""

    name: str
    """"camelidae", "qwen2idae" or "sparsetral"."""
    base_model_type: str
    """The dense family: "llama", "mistral" or "qwen2"."""
    expert_prefix: str
    """What stands before an expert's number in its keys: "expert_" or nothing."""


@dataclass(frozen=True)
class Target:
    """One tensor of ours and the published ones that make it: a copy of one, or a stack of all."""

    name: str
    sources: list[str]
    shape: tuple[int, ...]
    """Of each source."""
    stacked: bool


def is_published(values: dict[str, Any], names: Iterable[str]) -> bool:
    """Whether a config promises experts of these layouts, or keys hold some."""
    return bool(promises(values)) or any(expert_of(name) for name in names)


def detect(values: dict[str, Any], names: Iterable[str]) -> Layout:
    """Which of the layouts a checkpoint that `is_published` has, recognised by its keys and its config.

    Args:
        values: the config; its `model_type` may be "llama" or another dense family's.
        names: the checkpoint's keys.

    Raises:
        ValueError: when the keys are of two layouts, or the dense family is none of theirs.
    """
    names = set(names)
    prefixes = {match[2] for name in names if (match := _EXPERT.fullmatch(name))}
    if len(prefixes) > 1:
        raise ValueError("the keys mix two layouts, experts.I and experts.expert_I: the checkpoint is not of one model")
    named = _named_layout(values)
    base = _base(values, named, names)
    usual = "" if (named or _BY_BASE[base]) == "sparsetral" else "expert_"
    prefix = prefixes.pop() if prefixes else usual
    if not named:
        named = "sparsetral" if not prefix else "qwen2idae" if base == "qwen2" else "camelidae"
    return Layout(named, base, prefix)


def promises(values: dict[str, Any]) -> list[str]:
    """What in a config says that its model has experts of this method; empty for a dense model's config."""
    found = [f"{key} {text!r}" for key, text in _texts(values) if NAMES.search(text)]
    # num_experts alone is many architectures' field; the others are this method's.
    if any(key in values for key in ("adapter_dim", "moe_scaling", "topk")):
        found += [f"{key} {values[key]!r}" for key in METHOD_FIELDS if key in values]
    return found


def method_from(values: dict[str, Any]) -> PescConfig:
    """The method's settings in a published config.

    Raises:
        ValueError: naming every field that is missing or breaks its rule.
    """
    missing = [key for key in _REQUIRED if values.get(key) is None]
    if missing:
        raise ValueError(
            f"the config lacks {', '.join(missing)}, and neither a tensor nor a default can tell their values: "
            "add the values of its training to its config.json"
        )
    if values.get("quantization_config"):
        raise ValueError("the config has a quantization_config: import the unquantized checkpoint")
    settings = {ours: values[theirs] for theirs, ours in METHOD_FIELDS.items()}
    return PescConfig(**settings, **{key: values[key] for key in TRAINING_FIELDS if key in values})


def config_from(values: dict[str, Any], layout: Layout, names: Iterable[str]) -> PescModelConfig:
    """Our config of a published checkpoint; the published one stays in it, without the code it points to.

    Args:
        values: the published config.
        layout: as `detect` tells it.
        names: the checkpoint's keys; they show whether there are biases.

    Raises:
        ValueError: as `method_from` does.
    """
    pesc_config = method_from(values)
    dense = {key: value for key, value in values.items() if key not in _NOT_DENSE}
    dense["dtype"] = values.get("dtype") or values.get("torch_dtype")
    # What the layouts' own config classes take for absent fields.
    if "rope_parameters" not in dense:
        dense.setdefault("rope_theta", 10000.0)
    if layout.base_model_type == "mistral":
        dense.setdefault("sliding_window", 4096 if layout.name == "sparsetral" else None)
    if layout.base_model_type == "llama":
        dense.setdefault("attention_bias", "model.layers.0.self_attn.o_proj.bias" in set(names))
    with refused_in_one_line(f"the config is no {layout.base_model_type} config"):
        config = crafted_config(CONFIG_MAPPING[layout.base_model_type].from_dict(dense), pesc_config)
    kept = public_values({key: value for key, value in values.items() if key not in ("auto_map", SOURCE)})
    source = {
        "layout": layout.name,
        "expert_prefix": layout.expert_prefix,
        "auto_classes": sorted(set(_auto_map(values)) & {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}),
        "config": kept,
    }
    setattr(config, SOURCE, source)
    return config


def targets(skeleton: Any, layout: Layout) -> list[Target]:
    """Every tensor of a crafted model and the published tensors it comes from.

    Args:
        skeleton: the crafted model, on the meta device.
        layout: the published layout.
    """
    stacks: dict[str, Target] = {}
    for ffn_name, ffn in crafted_ffns(skeleton):
        moe_adapter = f"model.layers.{ffn_name.split('.')[2]}.mlp.moe_adapter"
        for ours, theirs in (("up_proj", "down"), ("down_proj", "up")):
            name, shape = f"{ffn_name}.experts.{ours}", tuple(getattr(ffn.experts, ours).shape)
            start = f"{moe_adapter}.experts.{layout.expert_prefix}"
            keys = [f"{start}{expert}.adapter_{theirs}.weight" for expert in range(shape[0])]
            stacks[name] = Target(name, keys, shape[1:], True)
        name = f"{ffn_name}.router.weight"
        stacks[name] = Target(name, [f"{moe_adapter}.router.weight"], tuple(ffn.router.weight.shape), False)
    return [
        stacks.get(name) or Target(name, [name], tuple(parameter.shape), False)
        for name, parameter in skeleton.named_parameters()
    ]


def expert_of(name: str) -> tuple[int, int, str] | None:
    """(layer, expert, "down" or "up") of a published key; None for a key of something else."""
    match = _EXPERT.fullmatch(name)
    return (int(match[1]), int(match[3]), match[4]) if match else None


def _named_layout(values: dict[str, Any]) -> str:
    """The layout that the config names; empty if it names none."""
    found = (NAMES.search(text) for key, text in _texts(values) if key != "_name_or_path")
    return next((match[0].lower() for match in found if match), "")


def _texts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(field, text) of all that may say a layout's name in a config."""
    texts = [(key, values.get(key)) for key in ("model_type", "_name_or_path")]
    texts += [("architectures", name) for name in _architectures(values)]
    texts += [("auto_map", name) for name in _auto_map(values).values()]
    return [(key, str(text)) for key, text in texts]


def _architectures(values: dict[str, Any]) -> list[Any]:
    found = values.get("architectures")
    return found if isinstance(found, list) else []


def _auto_map(values: dict[str, Any]) -> dict[str, Any]:
    found = values.get("auto_map")
    return found if isinstance(found, dict) else {}


def _base(values: dict[str, Any], named: str, names: set[str]) -> str:
    attention = "model.layers.0.self_attn.{}_proj.bias"
    if attention.format("q") in names and attention.format("o") not in names:
        return "qwen2"
    model_type = str(values.get("model_type"))
    base = BASES[named] if named else model_type
    if model_type in CLASSES:
        # A dense family's model_type was written by whoever saved the file again; the class tells more.
        classes = [str(name).rsplit(".", 1)[-1] for name in _architectures(values)]
        told = [family for family, start in CLASSES.items() for name in classes if name.startswith(f"{start}For")]
        base = told[0] if told else base
    if base not in CLASSES:
        raise ValueError(f"model_type ({model_type!r}) must be one of {', '.join([*BASES, *CLASSES])} in these layouts")
    # Mistral is Llama with a window, which Llama's class would ignore.
    return "mistral" if base == "llama" and values.get("sliding_window") is not None else base
