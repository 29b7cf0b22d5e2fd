"""Write crafted models in the layouts of the published checkpoints, key for key."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from pesc.crafting.load import ModelRef
from pesc.interop.format import Format, open_source
from pesc.interop.limits import head_dim_of, setting_of, uneven_reasons
from pesc.interop.published.importer import READER
from pesc.interop.published.layouts import (
    CLASSES,
    METHOD_FIELDS,
    SOURCE,
    TRAINING_FIELDS,
    Layout,
    config_from,
    targets,
)
from pesc.storage.files import write_json
from pesc.storage.weights import SHARD_BYTES, ShardWriter

_DENSE_FIELDS = (
    *("bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("rms_norm_eps", "tie_word_embeddings", "use_cache", "vocab_size"),
)
_FAMILY_FIELDS: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "pretraining_tp"),
    "mistral": ("attention_dropout",),
    "qwen2": ("attention_dropout", "max_window_layers", "use_sliding_window"),
}


def _write(ref: ModelRef, out: Path, layout: str) -> None:
    """Write a crafted model in the layout of Camelidae (Qwen2idae for a Qwen2 base) or Sparsetral.

    A model that was imported from the layout gets its keys and its config back; any other gets those of the
    published models. Weights keep their values and dtypes, and are read one at a time. The config names the authors'
    code, which is not in the folder.
    """
    config = ref.config
    kept = _kept_from_import(config, layout)
    published = _layout_of(config, layout, kept)
    source, plan = open_source(ref), targets(ref.skeleton(), published)
    writer, expert_dtype = ShardWriter(out, SHARD_BYTES), ""
    for target in plan:
        tensor = source.read(target.name)
        if target.stacked:
            expert_dtype = str(tensor.dtype).removeprefix("torch.")
        for index, key in enumerate(target.sources):
            writer.add(key, tensor[index] if target.stacked else tensor)
    writer.finish()
    if kept:
        values = _returned_config(config, published, kept, source.names, expert_dtype)
    else:
        values = _new_config(config, published, expert_dtype)
    write_json(out / "config.json", values, sort_keys=True)
    ref.copy_companions(out)


def _reasons_against(ref: ModelRef, layout: str) -> list[str]:
    config = ref.config
    return _method_reasons(config) or ([] if _kept_from_import(config, layout) else _dense_reasons(config, layout))


def _kept_from_import(config: Any, layout: str) -> dict[str, Any] | None:
    """The config that the import kept; None if the model comes from elsewhere."""
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


def _method_reasons(config: Any) -> list[str]:
    pesc_config, reasons = config.pesc_config, []
    if pesc_config.adapter_placement != "sequential" or pesc_config.adapter_activation != "gelu":
        reasons.append(
            f"its experts are {pesc_config.adapter_placement} + {pesc_config.adapter_activation}, and the layout's are "
            "sequential + gelu"
        )
    return [*reasons, *uneven_reasons(config, METHOD_FIELDS.values(), some_layers=False)]


def _dense_reasons(config: Any, layout: str) -> list[str]:
    family, reasons = config.base_model_type, []
    if family not in CLASSES or (family == "qwen2" and layout == "sparsetral"):
        return [f"its base is {family}, and the layout's code knows {_known_bases(layout)}"]
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    allowed = ("default", "linear", "dynamic") if layout == "camelidae" else ("default",)
    if rope_type not in allowed:
        reasons.append(f"its rope_type is {rope_type!r}, and the layout's code knows {', '.join(allowed)}")
    head_dim = head_dim_of(config)
    if head_dim * config.num_attention_heads != config.hidden_size:
        reasons.append(f"its head_dim ({head_dim}) is not hidden_size / heads")
    if family == "llama" and (config.attention_bias or config.mlp_bias):
        reasons.append("its Llama base has biases, and the layout's code has none")
    if family == "mistral" and layout == "camelidae" and config.sliding_window is not None:
        reasons.append(f"its sliding_window ({config.sliding_window}) needs Mistral's attention")
    return reasons


def _known_bases(layout: str) -> str:
    return "Llama, Qwen2, and Mistral without a window" if layout == "camelidae" else "Mistral and Llama"


def _returned_config(
    config: Any, layout: Layout, source: dict[str, Any], names: Iterable[str], expert_dtype: str
) -> dict[str, Any]:
    """The imported config with the changes since."""
    values = dict(source["config"])
    before = config_from(values, layout, names)
    now, then = _comparable(config), _comparable(before)
    now_theirs, then_theirs = _published_fields(config, layout), _published_fields(before, layout)
    changed = {key for key in now if now[key] != then.get(key)}
    values |= {key: value for key, value in now_theirs.items() if value != then_theirs.get(key)}
    values |= {key: now[key] for key in changed & set(values) if key not in now_theirs}
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
    values = _published_fields(config, layout)
    values |= {
        "architectures": [f"modeling_{layout.name}.{CLASSES[layout.base_model_type]}ForCausalLM"],
        "auto_map": _auto_map(layout),
        "model_type": layout.name,
        "moe_dtype": expert_dtype,
        "transformers_version": transformers.__version__,
    }
    if config.pad_token_id is not None:
        values["pad_token_id"] = config.pad_token_id
    return values


def _published_fields(config: Any, layout: Layout) -> dict[str, Any]:
    fields = (*_DENSE_FIELDS, *_FAMILY_FIELDS[layout.base_model_type])
    values = {key: getattr(config, key) for key in fields if hasattr(config, key)} | {"output_router_logits": False}
    rope = dict(config.rope_parameters or {})
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", "default")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": rope["factor"]}
    if layout.base_model_type != "llama":
        values["sliding_window"] = getattr(config, "sliding_window", None)
    values["torch_dtype"] = str(config.dtype or "float32").removeprefix("torch.")
    values |= {theirs: setting_of(config, ours) for theirs, ours in METHOD_FIELDS.items()}
    return values | {key: getattr(config.pesc_config, key) for key in TRAINING_FIELDS}


def _auto_map(layout: Layout) -> dict[str, str]:
    code, family = layout.name, CLASSES[layout.base_model_type]
    return {
        "AutoConfig": f"configuration_{code}.{code.capitalize()}Config",
        "AutoModel": f"modeling_{code}.{family}Model",
        "AutoModelForCausalLM": f"modeling_{code}.{family}ForCausalLM",
    }


PUBLISHED = [
    Format(
        name=layout,
        reasons_against=functools.partial(_reasons_against, layout=layout),
        write=functools.partial(_write, layout=layout),
        reader=READER,
    )
    for layout in ("camelidae", "sparsetral")
]
