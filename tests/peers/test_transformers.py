"""transformers' common tests of causal LMs, on crafted models and on the dense ones."""

from __future__ import annotations

import unittest
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from families import dense_config
from peers.sources import import_peer
from pesc import PescConfig
from pesc.crafting.configuration import crafted_config

# The archive on PyPI leaves out folders of tests.
common = import_peer(
    "transformers",
    "test_modeling_common",
    **{
        "exporters.test_export": {"ExportTesterMixin": object},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    },
)
configuration = import_peer(
    "transformers", "test_configuration_common", **{"utils.test_configuration_utils": {"config_common_kwargs": {}}}
)
training = import_peer("transformers", "test_training_mixin")

PESC = PescConfig(num_experts=4, adapter_dim=8)
_STRICT = "a crafted folder loads complete or not at all"
DIFFERENT = {
    "TestCraftedLlama::test_correct_missing_keys": _STRICT,
    ".*::test_model_weights_reload_no_missing_tied_weights": _STRICT,
    ".*::test_eager_matches_batched_and_grouped_inference": (
        "grouped_mm runs our own function, which aligns odd sizes; tests/method/test_backends.py compares it"
    ),
    ".*::test_training_gradient_checkpointing_use_reentrant_true": (
        "reentrant checkpointing cuts the router's losses off from the router, and is refused"
    ),
}


class ModelTester:
    """What transformers' mixins ask of a model: its config and a batch."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.causal_lm_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        self.sequence_classification_class = None
        self.num_hidden_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> PreTrainedConfig:
        return type(self.config)(**self.config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.config.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class CausalLM(common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin):
    """The mixins, for one family."""

    family: str
    crafted: bool

    def setUp(self) -> None:
        config = dense_config(self.family, num_hidden_layers=2)
        if self.crafted:
            config = crafted_config(config, PESC)
        self.model_tester = ModelTester(config)
        self.all_model_classes = (self.model_tester.causal_lm_class,)
        self.config_tester = configuration.ConfigTester(self, config_class=type(config))

    def subTest(self, *args: object, **kwargs: object) -> AbstractContextManager[None]:  # noqa: N802
        return nullcontext()  # a test passes or fails as a whole

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class TestDenseLlama(CausalLM, unittest.TestCase):
    family, crafted = "llama", False


class TestCraftedLlama(CausalLM, unittest.TestCase):
    family, crafted = "llama", True


class TestDenseGemma2(CausalLM, unittest.TestCase):
    family, crafted = "gemma2", False


class TestCraftedGemma2(CausalLM, unittest.TestCase):
    family, crafted = "gemma2", True
