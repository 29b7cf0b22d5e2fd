"""vLLM plugin: `vllm serve FOLDER` works on every crafted folder, with pesc installed beside vLLM.

Written against vLLM 0.32. To vLLM, a crafted model is a model of its dense family that also carries the method's
settings: the family's own config (so that whatever vLLM knows of the family by its config holds), with an
architecture of ours, whose class extends vLLM's class of the family (`pesc.vllm_plugin.models`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pesc.crafting.configuration import PescModelConfig

PREFIX = "Pesc"


def register() -> None:
    """Make vLLM read and build crafted models; the entry point in the group `vllm.general_plugins`.

    vLLM calls it in each of its processes, possibly more than once.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import config as vllm_config

    dense_names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) & ModelRegistry.get_supported_archs()
    for dense_name in sorted(dense_names):
        # By name, so that vLLM imports the class only when it may: importing one can start CUDA.
        ModelRegistry.register_model(PREFIX + dense_name, f"pesc.vllm_plugin.models:{PREFIX}{dense_name}")
        if dense_name in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[PREFIX + dense_name] = MODELS_CONFIG_MAP[dense_name]
    # `register_config_parser` would warn at every start that a parser is replaced, which is the point here.
    parsers = vllm_config._CONFIG_FORMAT_TO_CONFIG_PARSER
    if not getattr(parsers["hf"], "reads_crafted", False):
        parsers["hf"] = _crafted_parser(parsers["hf"])


def dense_view(config: PescModelConfig) -> Any:
    """A crafted model's config as its dense family's, with the settings under `pesc` and an architecture of ours.

    Args:
        config: as `AutoConfig` reads it from a crafted folder.

    Returns:
        An instance of the dense family's config class.

    Raises:
        ValueError: when vLLM does not know the dense family.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    from vllm.model_executor.models.registry import ModelRegistry

    dense_class = CONFIG_MAPPING[config.base_model_type]
    architecture = PREFIX + MODEL_FOR_CAUSAL_LM_MAPPING[dense_class].__name__
    if architecture not in ModelRegistry.get_supported_archs():
        raise ValueError(
            f"base_model_type ({config.base_model_type!r}) must be a family of vLLM's, but the installed one has no "
            f"{architecture.removeprefix(PREFIX)}: use a newer vLLM, or serve the folder with transformers (pesc serve)"
        )
    values = config.to_dict()
    for key in ("model_type", "base_model_type", "pesc", "architectures"):
        values.pop(key, None)
    dense = dense_class(**values)
    dense.architectures = [architecture]
    dense.pesc = config.pesc_config.to_dict()
    dense.name_or_path = config.name_or_path
    return dense


def _crafted_parser(parser: type) -> type:
    class CraftedConfigParser(parser):
        """vLLM's reader of Hugging Face configs; crafted ones come out as `dense_view`."""

        reads_crafted = True

        def parse(self, model: str | Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
            config_dict, config = super().parse(model, *args, **kwargs)
            return config_dict, dense_view(config) if isinstance(config, PescModelConfig) else config

    return CraftedConfigParser
