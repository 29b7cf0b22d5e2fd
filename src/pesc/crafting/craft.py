"""Craft a dense model: in memory, or on disk without loading it."""

from __future__ import annotations

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from pesc.config import PescConfig
from pesc.crafting.auto import PescBackbone, PescForCausalLM, extend_class
from pesc.crafting.model_config import crafted_config
from pesc.crafting.surgery import add_experts, refuse_moe


def craft(dense_model: PreTrainedModel, config: PescConfig | None = None) -> PreTrainedModel:
    """Turn a dense causal LM into a Mixture of Experts that computes exactly the same, until it is tuned.

    The model is changed in place, so its weights are never copied: the argument itself becomes the crafted model.

    Args:
        dense_model: a transformers causal LM of any family, on any device, quantized or not.
        config: the method's settings; the paper's by default.

    Returns:
        The same object, now also a `PescForCausalLM`. Routers and adapters lie beside their FFN, in the model's dtype.

    Raises:
        ValueError: for a model that is no dense causal LM of transformers, or whose FFNs cannot be found.
    """
    config = config or PescConfig()
    refuse_moe(dense_model.config)
    if type(dense_model) is not MODEL_FOR_CAUSAL_LM_MAPPING.get(type(dense_model.config), None):
        raise ValueError(
            "craft needs a causal LM of transformers, such as AutoModelForCausalLM loads; got "
            f"{type(dense_model).__name__}"
        )
    dense_config = dense_model.config
    add_experts(dense_model, config)
    new_config = crafted_config(dense_config, config)
    for module in dense_model.modules():
        for holder in (module, *vars(module).values()):
            if getattr(holder, "config", None) is dense_config:
                holder.config = new_config
    extend_class(dense_model.base_model, PescBackbone)
    extend_class(dense_model, PescForCausalLM)
    new_config._experts_implementation = dense_model.get_correct_experts_implementation(None)
    return dense_model
