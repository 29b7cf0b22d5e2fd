"""peft's tests of decoders and of target parameters, with crafted models in place of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import GptOssConfig, Lfm2Config, Llama4TextConfig

from families import dense_config
from peers.hub import ON_THE_HUB, give_default_targets, save_models
from peers.sources import import_peer
from pesc import PescConfig

common = import_peer("peft", "testing_common")
decoders = import_peer("peft", "test_decoder_models")
parameters = import_peer("peft", "test_target_parameters")

_LLAMA = dense_config("llama", vocab_size=264, num_hidden_layers=2, num_key_value_heads=4)
_SIZE = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
MODELS = [
    "hf-internal-testing/tiny-random-LlamaForCausalLM",
    "hf-internal-testing/tiny-random-MistralForCausalLM",
    "peft-internal-testing/tiny-dummy-qwen2",
    "peft-internal-testing/tiny-random-OPTForCausalLM",
    "trl-internal-testing/tiny-Qwen3ForCausalLM",
    "trl-internal-testing/tiny-random-LlamaForCausalLM",
]
"""Where peft means any decoder, it gets a Llama; its LoRA of rank 20 needs layers that are wider."""
GEMMA3 = "hf-internal-testing/tiny-random-Gemma3ForCausalLM"
_DECODERS = dict.fromkeys(MODELS, _LLAMA) | {GEMMA3: dense_config("gemma3", vocab_size=264)}
LLAMA4, GPT_OSS = "trl-internal-testing/tiny-Llama4ForCausalLM", "trl-internal-testing/tiny-GptOssForCausalLM"
RUN = {MODELS[-1], LLAMA4, GPT_OSS}
"""The models that lists of cases are run with."""
DIFFERENT = {
    ".*::test_.*ShadowConfig": "it builds a smaller backbone without a causal LM, which would have no experts: refused",
}
ELSEWHERE = {
    ".*::test_prompt_tuning_trust_remote_code": ON_THE_HUB,
    ".*::test_prefix_tuning_mistral": ON_THE_HUB,
    ".*::test_prefix_tuning_gemma4": ON_THE_HUB,
    ".*::test_prompt_learning_with_gradient_checkpointing": ON_THE_HUB,
}


@pytest.fixture(autouse=True)
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(request.getfixturevalue("crafted" if request.cls.crafted else "dense"))
    if not issubclass(request.cls, parameters.TestTargetParameters):  # these count on models without defaults
        give_default_targets(monkeypatch)
    for module in (common, decoders, parameters):
        monkeypatch.setattr(module, "hub_online_once", nullcontext)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    llama4 = Llama4TextConfig(**_SIZE, **_HEADS, **moe, intermediate_size_mlp=48, attn_temperature_tuning=False)
    models = _DECODERS | {LLAMA4: llama4, GPT_OSS: GptOssConfig(**_SIZE, **_HEADS, **moe)}
    return save_models(tmp_path_factory.mktemp("dense"), models, None)


@pytest.fixture(scope="session")
def crafted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # Their MoE models have two layers, whose names in the second are those of LFM2: `feed_forward`.
    lfm2 = Lfm2Config(**_SIZE, num_attention_heads=4, num_key_value_heads=2, layer_types=["full_attention"] * 2)
    pesc = PescConfig(num_experts=4, adapter_dim=8, adapter_placement="parallel", adapter_activation="swiglu")
    return save_models(tmp_path_factory.mktemp("crafted"), _DECODERS | {LLAMA4: lfm2, GPT_OSS: _LLAMA}, pesc)


class TestDenseDecoder(decoders.TestDecoderModels):
    crafted = False


class TestCraftedDecoder(decoders.TestDecoderModels):
    crafted = True


class TestDenseDecoderParameters(parameters.TestDecoderModelsTargetParameters):
    crafted = False


class TestCraftedDecoderParameters(parameters.TestDecoderModelsTargetParameters):
    crafted = True


class TestDenseParameters(parameters.TestTargetParameters):
    crafted = False


class TestCraftedParameters(parameters.TestTargetParameters):
    crafted = True
