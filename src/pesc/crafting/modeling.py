"""Crafted models as transformers classes: a causal LM for every dense family.

It extends the dense family's own class, whatever it is, so a crafted model keeps the dense names, attention, cache
and parallel plans.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from pesc.config import MODEL_TYPE
from pesc.crafting.backbone import PescBackbone, argument, argument_names, watch_routing
from pesc.crafting.surgery import add_experts
from pesc.method.backends import AUTO
from pesc.method.extend import Extension, extend_class
from pesc.method.losses import carry_loss
from pesc.storage.checksums import SUMS, write_checksums
from pesc.storage.compare import TensorDifferences
from pesc.storage.files import link_or_copy
from pesc.storage.weights import SINGLE

_OUTPUTS = ("loss", "logits", "past_key_values", "hidden_states", "attentions")


class PescForCausalLM(Extension, PreTrainedModel):
    """Extends a dense causal LM whose FFNs have experts.

    Saved with `save_pretrained`, loaded with `from_pretrained` or the Auto classes. `outputs.loss` is the language
    model's; in training its gradient includes that of the router's losses, weighted as the config says.
    """

    prefix = "Pesc"

    @classmethod
    def namespace(cls, dense: Any) -> dict[str, Any]:
        """The forward around the dense family's."""
        _take_over_renamings(dense, cls.prefix + dense.__name__)
        return {"forward": crafted_forward(dense.forward)}

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        _refuse_fp8_experts(getattr(config, "quantization_config", None))
        requested = config._experts_implementation
        # The dense family's own modules know no experts, and refuse a config that names a backend for them.
        config._experts_implementation = "eager"
        super().__init__(config, *args, **kwargs)
        add_experts(self, config.pesc_config)
        extend_class(self.base_model, PescBackbone)
        config._experts_implementation = self.get_correct_experts_implementation(requested)

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, but strict: nothing is dropped, and nothing is made up, in silence.

        Raises:
            ValueError: listing every missing, unexpected and misshapen tensor at once.
        """
        if ignore_mismatched_sizes:
            raise ValueError("ignore_mismatched_sizes must be left out: a crafted model loads complete or not at all")
        # With it off, transformers raises at the first kind of problem; the complete list is made below.
        model, info = super().from_pretrained(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        loading_differences(info).refuse(f"{args[0] if args else cls.__name__} does not hold this crafted model")
        return (model, info) if output_loading_info else model

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """As transformers' own, for LoRA that `save_pretrained` can write; `pesc.add_lora` also lets experts train.

        Raises:
            ValueError: for every other adapter.
        """
        from pesc.crafting.lora import refuse_unsavable

        refuse_unsavable(adapter_config, adapter_name)
        super().add_adapter(adapter_config, adapter_name)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a standalone folder; while the model carries LoRA, the adapter's files, as `pesc.save_adapter` does."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            (Path(save_directory) / SUMS).unlink(missing_ok=True)  # of what was saved there before
            super().save_pretrained(save_directory, *args, **kwargs)
        elif kwargs.get("is_main_process", True):
            from pesc.crafting.adapter import ADAPTER_JSON, ADAPTER_WEIGHTS, write_adapter

            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_adapter(self, Path(save_directory))
            # Trainers resume from a file of this name, and read from it the tensors that it has.
            link_or_copy(Path(save_directory) / ADAPTER_WEIGHTS, Path(save_directory) / SINGLE)
            write_checksums(Path(save_directory), [ADAPTER_JSON, ADAPTER_WEIGHTS, SINGLE])

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's; with `strict=False` nothing is missing where LoRA, routers and experts are all there."""
        from pesc.crafting.lora import adapter_tensors

        loaded = super().load_state_dict(state_dict, *args, **kwargs)
        if state_dict.keys() == adapter_tensors(self).keys():
            loaded.missing_keys.clear()
        return loaded

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: every dense module is transformers' own, and is initialised and renamed by its rules."""
        return False

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The backend for a requested name; by default `auto_experts_forward` chooses."""
        return super().get_correct_experts_implementation(requested_experts or AUTO)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the decorator in the dense family's source, where it is not


def crafted_forward(dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A crafted model's forward around its dense family's, with that one's signature and documentation.

    It also takes `output_router_logits`. The output is then a `MoeCausalLMOutputWithPast`: `aux_loss`, the balance
    loss summed over layers without its weight, and `router_logits`, a [T, E] fp32 tensor for each crafted layer.
    Both are there to be looked at and carry no gradient. `loss` is the language model's alone.
    """
    names = argument_names(dense_forward)

    @can_return_tuple
    @functools.wraps(dense_forward)
    def forward(self: Any, *args: Any, output_router_logits: bool | None = None, **kwargs: Any) -> Any:
        trains = self.training and torch.is_grad_enabled()
        if not (trains or output_router_logits):
            return dense_forward(self, *args, return_dict=True, **kwargs)
        if trains:
            _refuse_unknown_scale(self, argument("labels", names, args, kwargs), kwargs.get("num_items_in_batch"))
        with watch_routing(self.base_model) as passes:
            outputs = dense_forward(self, *args, return_dict=True, **kwargs)
        (routing,) = passes
        if trains and outputs.loss is not None and kwargs.get("num_items_in_batch") is None:
            outputs.loss = _follow_loss(outputs.loss, routing.loss, self.base_model.loss_scale())
        if output_router_logits:
            outputs = MoeCausalLMOutputWithPast(
                **{name: outputs.get(name) for name in _OUTPUTS},
                aux_loss=routing.aux_loss.detach(),
                router_logits=tuple(logits.detach() for logits in routing.router_logits),
            )
        return outputs

    forward.__signature__ = _with_output_router_logits(inspect.signature(dense_forward))
    return forward


def _follow_loss(loss: torch.Tensor, router_loss: torch.Tensor, scale: float) -> torch.Tensor:
    # The caller may divide the model's loss, or multiply it, and the router's losses must come out at the same scale.
    # So this loss brings them at its own, and takes back what the backbone adds at the scale it knows of.
    value = router_loss.to(loss.device)
    return carry_loss(loss + (value - value.detach()), router_loss, -scale)


def _refuse_unknown_scale(model: Any, labels: Any, num_items: Any) -> None:
    device = model.device.type
    scaled = labels is None and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    if model.base_model.router_loss_scale is None and (scaled or num_items is not None):
        cause = "float16 autocast without labels" if scaled else "num_items_in_batch"
        raise ValueError(
            f"{cause} hides how the loss is scaled, so the router's losses cannot be scaled the same way: call "
            "pesc.set_router_loss_scale(model, scale), with 1 / micro-batches of a step times the scale of a GradScaler"
        )


def _with_output_router_logits(signature: inspect.Signature) -> inspect.Signature:
    extra = inspect.Parameter("output_router_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    named = [p for p in signature.parameters.values() if p.name != extra.name]
    catch_all = [p for p in named if p.kind is inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*(p for p in named if p not in catch_all), extra, *catch_all])


def loading_differences(info: Any) -> TensorDifferences:
    """Every mismatch in transformers' loading info."""
    info = info if isinstance(info, dict) else vars(info)
    return TensorDifferences(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        misshapen={key: (list(found), list(expected)) for key, found, expected in info["mismatched_keys"]},
        others=[f"unreadable: {error}" for error in info.get("error_msgs") or []],
    )


def _take_over_renamings(dense: Any, name: str) -> None:
    # transformers knows by class name, or model type, which weights have other names on disk than in the model.
    renamings = get_checkpoint_conversion_mapping(dense.__name__)
    if renamings is None:
        renamings = get_checkpoint_conversion_mapping(dense.config_class.model_type)
    if renamings is not None:
        register_checkpoint_conversion_mapping(name, renamings, overwrite=True)


def _refuse_fp8_experts(quantization: Any) -> None:
    # transformers' FP8 loader replaces every module named "experts" by one of its own.
    if getattr(quantization, "quant_method", None) == "fp8" and not quantization.dequantize:
        kept = quantization.modules_to_not_convert or []
        if not any("experts" in name for name in kept):
            raise ValueError(
                f"FP8 would replace the experts: modules_to_not_convert ({kept}) must name them; give "
                'FineGrainedFP8Config(modules_to_not_convert=["lm_head", "experts"])'
            )


def __getattr__(name: str) -> Any:
    """The class made for a dense one, such as PescLlamaForCausalLM: pickle and peft look for it here by its name."""
    dense_name = name.removeprefix(PescForCausalLM.prefix)
    if dense_name == name or dense_name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family = getattr(transformers, dense_name).config_class.model_type
    config = CONFIG_MAPPING[MODEL_TYPE].from_dict({"base_model_type": family})
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
