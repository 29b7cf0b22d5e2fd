"""Write one of our folders in the layout of the published checkpoints, key for key."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import transformers

from pesc.crafting.load import find_adapter, load_config
from pesc.crafting.skeleton import skeleton_of
from pesc.crafting.sources import resolve
from pesc.interop.published.layouts import METHOD_FIELDS, SOURCE, TRAINING_FIELDS, Layout, Target, config_from, targets
from pesc.storage.files import copy_companions, new_folder
from pesc.storage.weights import SHARD_BYTES, ShardWriter, Weights

_CODE = {"camelidae": "Camelidae", "qwen2idae": "Qwen2idae", "sparsetral": "Sparsetral"}


_CLASS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}


_DENSE_FIELDS = (
    *("bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("output_router_logits", "rms_norm_eps", "tie_word_embeddings", "use_cache", "vocab_size"),
)


_FAMILY_FIELDS: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "pretraining_tp"),
    "mistral": ("attention_dropout",),
    "qwen2": ("attention_dropout", "max_window_layers", "use_sliding_window"),
}


def export_layout(model_folder: str | Path, out: Path, layout: Literal["camelidae", "sparsetral"]) -> Path:
    """Write a crafted folder in the layout of Camelidae (Qwen2idae for a Qwen2 base) or Sparsetral.

    A model that was imported from the layout gets its keys and its config back; one that was not gets what
    the published models have. Weights keep their values and dtypes, and are read one at a time.

    Args:
        model_folder: a crafted model without LoRA, sequential + gelu, of a Llama, Mistral or Qwen2 base.
        out: a folder that does not exist yet.
        layout: "camelidae" or "sparsetral".

    Returns:
        `out`. Its config names the authors' code, which is not in the folder.

    Raises:
        FileExistsError: when `out` is there already.
        FileNotFoundError: when the model is not there.
        ValueError: for a model that the layout cannot express, with each reason and the nearest thing that
            works; and for a folder that is not whole.
    """
    if layout not in ("camelidae", "sparsetral"):
        raise ValueError(f"layout ({layout!r}) must be camelidae or sparsetral")
    if find_adapter(model_folder):
        raise ValueError(f"{model_folder} is an adapter folder: export it with --format pesc first, then that")
    folder = resolve(model_folder)
    config = load_config(model_folder)
    if config.model_type != "pesc":
        raise ValueError(f"{model_folder} (model_type {config.model_type!r}) is no crafted model: craft it first")
    source = _source_of(config, layout)
    if refusals := layout_reasons(config, layout):
        raise ValueError(f"the {layout} layout cannot hold {model_folder}: " + "; ".join(refusals))
    foreign = _layout_of(config, layout, source)
    weights = Weights(folder)
    plan = targets(skeleton_of(config), foreign)
    _check_whole(plan, weights)
    bank = weights.tensors[next(target.name for target in plan if target.stacked)]
    if source:
        values = _returned_config(config, foreign, source, weights.tensors, bank.dtype)
    else:
        values = _new_config(config, foreign, bank.dtype)
    with new_folder(out) as partial:
        writer = ShardWriter(partial, SHARD_BYTES)
        for target in plan:
            tensor = weights.read(target.name)
            for index, key in enumerate(target.sources):
                writer.add(key, tensor[index] if target.stacked else tensor)
        writer.finish()
        (partial / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        copy_companions(folder, partial)
    return out


def layout_reasons(config: Any, layout: str) -> list[str]:
    """Why a crafted model's config cannot be written in a layout; empty when it can."""
    return _method_refusals(config) or ([] if _source_of(config, layout) else _dense_refusals(config, layout))


def _source_of(config: Any, layout: str) -> dict[str, Any] | None:
    """What the import kept, where the model comes from this very layout."""
    source = getattr(config, SOURCE, None)
    if not isinstance(source, dict):
        return None
    wanted = "" if layout == "sparsetral" else "expert_"
    return source if source["expert_prefix"] == wanted else None


def _layout_of(config: Any, layout: str, source: dict[str, Any] | None) -> Layout:
    if source:
        return Layout(source["layout"], config.base_model_type, source["expert_prefix"])
    if layout == "sparsetral":
        return Layout("sparsetral", "mistral", "")
    if config.base_model_type == "qwen2":
        return Layout("qwen2idae", "qwen2", "expert_")
    return Layout("camelidae", "llama", "expert_")


def _method_refusals(config: Any) -> list[str]:
    method, nearest = config.method, "use --format pesc"
    reasons = []
    if method.adapter_placement != "sequential" or method.adapter_activation != "gelu":
        both = method.adapter_placement == "parallel" and method.adapter_activation == "swiglu"
        stock = "use --format granitemoeshared, which holds it exactly, or pesc" if both else nearest
        reasons.append(
            f"its experts are {method.adapter_placement} + {method.adapter_activation}, and the layout's are "
            f"sequential + gelu ({stock})"
        )
    for name in METHOD_FIELDS.values():
        value = getattr(method, name)
        if isinstance(value, list) and len(set(value)) > 1:
            reasons.append(f"{name} ({value}) differs between layers, and the layout has one for all ({nearest})")
    crafted = method.layers
    if crafted is not None and crafted != list(range(config.num_hidden_layers)):
        reasons.append(f"only layers {crafted} have experts, and the layout gives every layer some ({nearest})")
    return reasons


def _dense_refusals(config: Any, layout: str) -> list[str]:
    family = config.base_model_type
    if family not in _CLASS or (family == "qwen2" and layout == "sparsetral"):
        way = "use --format camelidae" if family == "qwen2" else "use --format pesc"
        return [f"its base is {family}, and the layout's code knows {_known_bases(layout)} ({way})"]
    reasons = []
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    allowed = ("default", "linear", "dynamic") if layout == "camelidae" else ("default",)
    if rope_type not in allowed:
        known = ", ".join(allowed)
        reasons.append(f"its rope_type is {rope_type!r}, and the layout's code knows {known} (use --format pesc)")
    head_dim = getattr(config, "head_dim", None)
    if head_dim and head_dim * config.num_attention_heads != config.hidden_size:
        reasons.append(f"its head_dim ({head_dim}) is not hidden_size / heads (use --format pesc)")
    if family == "llama" and (config.attention_bias or config.mlp_bias):
        reasons.append("its Llama base has biases, and the layout's code has none (use --format pesc)")
    if family == "mistral" and layout == "camelidae" and config.sliding_window is not None:
        window = config.sliding_window
        reasons.append(f"its sliding_window ({window}) needs Mistral's attention (use --format sparsetral)")
    return reasons


def _known_bases(layout: str) -> str:
    return "Llama, Qwen2, and Mistral without a window" if layout == "camelidae" else "Mistral and Llama"


def _check_whole(plan: list[Target], weights: Weights) -> None:
    lines = [f"  missing: {target.name}" for target in plan if target.name not in weights.tensors]
    for target in plan:
        shape = (len(target.sources), *target.shape) if target.stacked else target.shape
        found = weights.tensors.get(target.name)
        if found and found.shape != shape:
            shapes = f"{list(found.shape)} in the file, {list(shape)} by the config"
            lines.append(f"  wrong shape: {target.name} is {shapes}")
    if lines:
        raise ValueError(f"{weights.folder} does not hold the model its config describes:\n" + "\n".join(lines))


def _returned_config(
    config: Any, layout: Layout, source: dict[str, Any], names: Iterable[str], expert_dtype: str
) -> dict[str, Any]:
    """The source's config, with what has changed since the import."""
    values = dict(source["config"])
    before = config_from(values, layout, names)
    now, then = _comparable(config), _comparable(before)
    now_foreign, then_foreign = _foreign_fields(config, layout), _foreign_fields(before, layout)
    changed = {key for key in now if now[key] != then.get(key)}
    values |= {key: value for key, value in now_foreign.items() if value != then_foreign.get(key)}
    values |= {key: now[key] for key in changed & set(values) if key not in now_foreign}
    if now["dtype"] != then["dtype"]:
        values["moe_dtype"] = expert_dtype
    auto_map = _auto_map(layout)
    kept = {key: auto_map[key] for key in source["auto_classes"]}
    return values | ({"auto_map": kept} if kept else {})


def _comparable(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    for key in ("architectures", "transformers_version", "model_type", "pesc", SOURCE):
        values.pop(key, None)
    return values


def _new_config(config: Any, layout: Layout, expert_dtype: str) -> dict[str, Any]:
    """The config that a published model of the layout has."""
    values = _foreign_fields(config, layout)
    values |= {
        "architectures": [f"modeling_{layout.name}.{_CLASS[layout.base_model_type]}ForCausalLM"],
        "auto_map": _auto_map(layout),
        "model_type": layout.name,
        "moe_dtype": expert_dtype,
        "transformers_version": transformers.__version__,
    }
    if config.pad_token_id is not None:
        values["pad_token_id"] = config.pad_token_id
    return values


def _foreign_fields(config: Any, layout: Layout) -> dict[str, Any]:
    fields = (*_DENSE_FIELDS, *_FAMILY_FIELDS[layout.base_model_type])
    values = {key: getattr(config, key) for key in fields if hasattr(config, key)}
    rope = dict(config.rope_parameters or {})
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", "default")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": rope["factor"]}
    if layout.base_model_type != "llama":
        values["sliding_window"] = getattr(config, "sliding_window", None)
    values["torch_dtype"] = str(config.dtype or "float32").removeprefix("torch.")
    method = config.method
    for theirs, ours in METHOD_FIELDS.items():
        value = getattr(method, ours)
        values[theirs] = value[0] if isinstance(value, list) else value
    return values | {key: getattr(method, key) for key in TRAINING_FIELDS}


def _auto_map(layout: Layout) -> dict[str, str]:
    code, family = layout.name, _CLASS[layout.base_model_type]
    return {
        "AutoConfig": f"configuration_{code}.{_CODE[code]}Config",
        "AutoModel": f"modeling_{code}.{family}Model",
        "AutoModelForCausalLM": f"modeling_{code}.{family}ForCausalLM",
    }
