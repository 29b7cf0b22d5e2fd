"""Crafted models as transformers classes: a backbone and a causal LM for every dense family.

They extend the dense family's own classes, whatever it is, so a crafted model keeps the dense names, attention, cache
and parallel plans.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from pesc.crafting.surgery import add_experts, crafted_ffns
from pesc.method.backends import AUTO
from pesc.method.extend import Extension, extend_class
from pesc.method.losses import router_losses
from pesc.method.routing import record_router_logits
from pesc.storage.compare import TensorDifferences


class PescBackbone(Extension, PreTrainedModel):
    """Extends a dense backbone: its output carries `router_logits` when they are asked for."""

    prefix = "Pesc"

    def forward(self, *args: Any, output_router_logits: bool | None = None, **kwargs: Any) -> Any:
        """The dense forward; `router_logits` is a tuple with a [T, E] fp32 tensor for each crafted layer."""
        if not _default(output_router_logits, self.config.output_router_logits):
            return super().forward(*args, **kwargs)
        with record_router_logits(self) as router_logits:
            outputs = super().forward(*args, **kwargs)
        outputs["router_logits"] = tuple(router_logits)
        return outputs


class PescForCausalLM(Extension, PreTrainedModel):
    """Extends a dense causal LM whose FFNs have experts.

    Saved with `save_pretrained`, loaded with `from_pretrained` or the Auto classes. In training, the loss includes
    the router's losses, weighted as the config says.
    """

    prefix = "Pesc"

    @classmethod
    def namespace(cls, dense: Any) -> dict[str, Any]:
        """The forward around the dense family's."""
        _take_over_renamings(dense, cls.prefix + dense.__name__)
        return {"forward": crafted_forward(dense.forward)}

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        requested = config._experts_implementation
        # The dense family's own modules know no experts, and refuse a config that names a backend for them.
        config._experts_implementation = "eager"
        super().__init__(config, *args, **kwargs)
        add_experts(self, config.method)
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

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a standalone folder; while the model carries LoRA, the adapter's files, as `pesc.save_adapter` does."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, *args, **kwargs)
        elif kwargs.get("is_main_process", True):
            from pesc.crafting.adapter import write_adapter

            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_adapter(self, Path(save_directory))

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: every dense module is transformers' own, and is initialised and renamed by its rules."""
        return False

    def router_loss(
        self, router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's losses for one batch.

        Args:
            router_logits: a [T, E] tensor for each crafted layer, as `record_router_logits` collects them.
            attention_mask: [B, S], 1 for real tokens.

        Returns:
            (balance loss summed over layers, without its weight; what is added to the loss, weights included).
        """
        method = self.config.method
        top_k = [ffn.router.num_experts_per_tok for _, ffn in crafted_ffns(self)]
        balance, z = router_losses(
            router_logits=router_logits, num_experts_per_tok=top_k, attention_mask=attention_mask
        )
        return balance, method.router_aux_loss_coef * balance + method.router_z_loss_coef * z

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        # Both public ways to switch checkpointing on, the newer one and the deprecated one, end here.
        settings = getattr(kwargs.get("gradient_checkpointing_func"), "keywords", {})
        if enable and settings.get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True cuts the router's losses off from the router: "
                "use use_reentrant=False"
            )
        super()._set_gradient_checkpointing(enable, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The backend for a requested name; by default `auto_experts_forward` chooses."""
        return super().get_correct_experts_implementation(requested_experts or AUTO)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the decorator in the dense family's source, where it is not


def crafted_forward(dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A crafted model's forward around its dense family's, with that one's signature and documentation.

    The result takes `output_router_logits` (the config's by default). The output is a `MoeCausalLMOutputWithPast`:
    `aux_loss`, the balance loss summed over layers without its weight, and `router_logits`. The loss includes the
    router's losses, weighted, in training and whenever router logits are asked for.
    """
    signature = inspect.signature(dense_forward)
    extra = inspect.Parameter("output_router_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    named = [p for p in signature.parameters.values() if p.name != extra.name]
    catch_all = [p for p in named if p.kind is inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(dense_forward)
    def forward(self: Any, *args: Any, output_router_logits: bool | None = None, **kwargs: Any) -> Any:
        show = _default(output_router_logits, self.config.output_router_logits)
        given = signature.bind(self, *args, **kwargs).arguments
        labels = given.get("labels")
        if not show and not (self.training and labels is not None):
            return dense_forward(self, *args, **kwargs)
        return_dict = _default(kwargs.pop("return_dict", None), self.config.return_dict)
        with record_router_logits(self) as router_logits:
            outputs = dense_forward(self, *args, return_dict=True, **kwargs)
        aux_loss, weighted = self.router_loss(router_logits, given.get("attention_mask"))
        loss = outputs.loss
        if loss is not None:
            num_items = kwargs.get("num_items_in_batch")
            loss = loss + (weighted * _share_of_batch(labels, num_items)).to(loss.device)
        outputs = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=tuple(router_logits) if show else None,
        )
        return outputs if return_dict else outputs.to_tuple()

    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*(p for p in named if p not in catch_all), extra, *catch_all]
    )
    return forward


def _share_of_batch(labels: Any, num_items: torch.Tensor | int | None) -> torch.Tensor | float:
    # The trainer accumulates gradients over micro-batches whose losses are sums divided by the items of all of them;
    # router losses are means, so each micro-batch must bring its own share for the shares to sum to 1.
    if num_items is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / torch.as_tensor(num_items, device=labels.device)


def _default(value: bool | None, fallback: bool) -> bool:
    return fallback if value is None else value


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
