"""The config of crafted models, for every dense family.

One `model_type`, "pesc", covers all families: `base_model_type` names the dense one, whose fields stay at the top
level, and `pesc` holds the method's settings. Auto classes without `pesc` imported know no such type and refuse the
folder. This module loads while transformers' registry does, so it imports the rest of transformers only when used.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from pesc.config import MODEL_TYPE, PescConfig

# What a crafted config says itself; some dense families have fields of these names, empty.
_OWNED = ("pesc", "num_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")
# Where a config.json names the backend of experts: classes without experts refuse one that they do not know. Without
# it, a dense class that is given a crafted folder would leave its experts out.
_FOR_OTHER_CLASSES = "pesc: load this folder with AutoModelForCausalLM, after `import pesc`"


def register() -> None:
    """Make transformers' Auto classes know the model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING.register(MODEL_TYPE, PescModelConfig, exist_ok=True)


class PescModelConfig(PreTrainedConfig):
    """What a crafted model's config has beyond its dense family's fields.

    `config.pesc` is the method's `PescConfig`; `num_experts` and `num_experts_per_tok` read from it under the names
    that other libraries look for. There is no `output_router_logits`: with it, trl would add a balance loss of
    its own to the one that the model brings.
    """

    model_type = MODEL_TYPE
    # No remote code; trl looks for it where the architecture is not transformers' own.
    auto_map: ClassVar[dict[str, str]] = {}
    base_model_type: str | None = None
    pesc: PescConfig | dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.pesc, PescConfig):
            self.pesc = PescConfig.from_dict(self.pesc or {})
        if kwargs.get("experts_implementation") == _FOR_OTHER_CLASSES:
            del kwargs["experts_implementation"]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config of the family that `base_model_type` names.

        Raises:
            ValueError: when that family is missing or unknown to the installed transformers.
        """
        if cls is not PescModelConfig:
            return super().from_dict(config_dict, **kwargs)
        return config_class_of_family(config_dict.get("base_model_type")).from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the method's settings stand under "pesc"."""
        values = super().to_dict()
        values["pesc"] = self.pesc_config.to_dict()
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return super().to_diff_dict() | {"experts_implementation": _FOR_OTHER_CLASSES}

    def __reduce__(self) -> Any:
        # The class is made at run time, so pickle (workers of vLLM, multiprocessing) cannot find it by name.
        return _empty_config, (self.base_model_type,), self.__dict__

    @property
    def pesc_config(self) -> PescConfig:
        """The method's settings."""
        assert isinstance(self.pesc, PescConfig)
        return self.pesc

    @property
    def num_experts(self) -> int | list[int]:
        """E, or a list with one for each crafted layer."""
        return self.pesc_config.num_experts

    @num_experts.setter
    def num_experts(self, value: object) -> None:
        _refuse_value("num_experts", value)

    @property
    def num_experts_per_tok(self) -> int | list[int]:
        """K, or a list with one for each crafted layer."""
        return self.pesc_config.num_experts_per_tok

    @num_experts_per_tok.setter
    def num_experts_per_tok(self, value: object) -> None:
        _refuse_value("num_experts_per_tok", value)


@functools.cache
def crafted_config_class(dense: type[PreTrainedConfig]) -> type[PescModelConfig]:
    """The config class of a dense config class's crafted models, known to `AutoModelForCausalLM` from here on."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from pesc.crafting.modeling import PescForCausalLM
    from pesc.method.extend import extended

    config_class = type(PescModelConfig.__name__, (PescModelConfig, dense), {"__module__": __name__})
    model_class = extended(MODEL_FOR_CAUSAL_LM_MAPPING[dense], PescForCausalLM)
    model_class.config_class = config_class
    AutoModelForCausalLM.register(config_class, model_class)
    # Trainers and pipelines recognise a causal LM by its class's name.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"{MODEL_TYPE}-{dense.model_type}"] = model_class.__name__
    return config_class


def config_class_of_family(family: str | None) -> type[PescModelConfig]:
    """The crafted config class of a dense `model_type`.

    Raises:
        ValueError: when the installed transformers has no causal LM of that type.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if family not in CONFIG_MAPPING or MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[family], None) is None:
        raise ValueError(
            f"base_model_type ({family!r}) must be the model_type of a causal LM that transformers knows: the config "
            "is not a crafted model's, or needs a newer transformers"
        )
    return crafted_config_class(CONFIG_MAPPING[family])


def _empty_config(family: str | None) -> PescModelConfig:
    config_class = config_class_of_family(family)
    return config_class.__new__(config_class)


def crafted_config(dense_config: PreTrainedConfig, config: PescConfig) -> PescModelConfig:
    """The config of a crafted model: the dense one's fields and the method's settings.

    Raises:
        ValueError: when the dense config is not one of a transformers causal LM.
    """
    config_class = config_class_of_family(dense_config.model_type)
    values = dense_config.to_dict()
    for key in (*_OWNED, "model_type", "architectures", "transformers_version", "auto_map"):
        values.pop(key, None)
    new = config_class(**values, base_model_type=dense_config.model_type, pesc=config)
    new.name_or_path = dense_config.name_or_path or ""
    new._attn_implementation = dense_config._attn_implementation
    return new


def _refuse_value(name: str, value: object) -> None:
    if value:  # a dense family's own empty field is no request
        raise ValueError(f"{name} ({value!r}) is read from the settings under `pesc`: set it there")
