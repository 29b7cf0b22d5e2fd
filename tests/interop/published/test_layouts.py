"""Every published config builds, with exactly the parameters the paper's table gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from pesc.crafting.cost import count_parameters
from pesc.crafting.skeleton import skeleton_of
from pesc.interop.published.layouts import Layout, config_from, detect, is_published, method_from, promises, targets
from published import FIXTURES

# Base family, key prefix, K, s, and in billions: adapters, total and active parameters. The paper's numbers leave out
# the routers; those of Sparsetral, which it does not give, are computed the same way.
PUBLISHED = {
    "Camelidae-8x7B": ("llama", "expert_", 2, 0.25, 1.074, 7.81, 7.01),
    "Camelidae-8x13B": ("llama", "expert_", 2, 0.25, 1.678, 14.69, 13.44),
    "Qwen2idae-16x14B-v1.0": ("qwen2", "expert_", 4, 0.25, 3.355, 17.52, 15.01),
    "sparsetral-16x7B-v1": ("mistral", "", 4, 1, 0.268, 7.51, 7.31),
    "sparsetral-16x7B-v2": ("mistral", "", 4, 1, 2.147, 9.39, 7.78),
}


def published(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / "published-configs" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_build_with_the_papers_counts(name: str) -> None:
    base, prefix, top_k, scaling, *billions = PUBLISHED[name]
    values = published(name)
    layout = detect(values, [])
    assert (layout.base_model_type, layout.expert_prefix) == (base, prefix)
    config = config_from(values, layout, [])
    assert (config.pesc_config.num_experts_per_tok, config.pesc_config.adapter_scaling) == (top_k, scaling)
    skeleton = skeleton_of(config)
    counts = count_parameters(skeleton)
    dense = skeleton_of(CONFIG_MAPPING[base].from_dict(config.to_dict() | {"model_type": base})).num_parameters()
    experts, width = config.pesc_config.num_experts, config.pesc_config.adapter_dim
    routers = config.num_hidden_layers * experts * config.hidden_size
    adapters = routers * 2 * width
    assert counts.total - dense == counts.trained == adapters + routers
    assert counts.total - counts.active == adapters * (experts - top_k) // experts
    without_routers = adapters / 1e9, (counts.total - routers) / 1e9, (counts.active - routers) / 1e9
    assert [round(number, digits) for number, digits in zip(without_routers, (3, 2, 2), strict=True)] == billions


def test_targets_name_every_key_once() -> None:
    values = published("sparsetral-16x7B-v1")
    layout = detect(values, [])
    plan = targets(skeleton_of(config_from(values, layout, [])), layout)
    keys = [key for target in plan for key in target.sources]
    assert len(keys) == len(set(keys)) == 32 * (9 + 1 + 2 * 16) + 3
    assert "model.layers.31.mlp.moe_adapter.experts.15.adapter_up.weight" in keys


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        ({"model_type": "camelidae"}, ["expert_0"], Layout("camelidae", "llama", "expert_")),
        ({"model_type": "qwen2idae"}, ["expert_0"], Layout("qwen2idae", "qwen2", "expert_")),
        ({"model_type": "qwen2idae"}, ["0"], Layout("qwen2idae", "qwen2", "")),
        ({"model_type": "sparsetral"}, ["0"], Layout("sparsetral", "mistral", "")),
        ({"model_type": "llama"}, ["expert_0"], Layout("camelidae", "llama", "expert_")),
        ({"model_type": "mistral"}, ["0"], Layout("sparsetral", "mistral", "")),
        ({"model_type": "qwen2"}, ["expert_0"], Layout("qwen2idae", "qwen2", "expert_")),
        ({"model_type": "llama", "sliding_window": 4096}, ["0"], Layout("sparsetral", "mistral", "")),
        (
            {"model_type": "llama", "architectures": ["MistralForCausalLM"], "topk": 4},
            [],
            Layout("sparsetral", "mistral", ""),
        ),
    ],
)
def test_layouts_are_told_by_keys_and_config(values: dict, names: list[str], expected: Layout) -> None:
    keys = [f"model.layers.0.mlp.moe_adapter.experts.{name}.adapter_down.weight" for name in names]
    assert detect(values, keys) == expected


def test_what_is_none_of_them_is_refused() -> None:
    assert not is_published({"model_type": "llama", "num_experts": 1}, ["model.embed_tokens.weight"])
    start = "model.layers.0.mlp.moe_adapter.experts"
    with pytest.raises(ValueError, match="mix two layouts"):
        detect({"model_type": "llama"}, [f"{start}.0.adapter_up.weight", f"{start}.expert_1.adapter_up.weight"])
    with pytest.raises(ValueError, match=r"model_type \('gemma'\) must be one of"):
        detect({"model_type": "gemma"}, [f"{start}.0.adapter_up.weight"])


def test_promises_name_what_says_so() -> None:
    values = published("Camelidae-8x7B")
    assert "topk 2" in promises(values)
    assert any("modeling_camelidae" in promise for promise in promises(values))
    assert promises({"model_type": "mixtral", "num_experts": 8}) == []


def test_training_fields_default_to_the_papers() -> None:
    method = method_from(published("Camelidae-8x13B"))
    assert (method.router_aux_loss_coef, method.adapter_dropout, method.adapter_placement) == (0.01, 0.0, "sequential")
