"""Crafted models as vLLM classes: vLLM's own class of the dense family, its FFNs extended in place.

`PescLlamaForCausalLM` and its like are made when first asked for, one for each dense class; vLLM's registry asks for
them by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.registry import ModelRegistry

from pesc.config import PescConfig
from pesc.crafting.configuration import crafted_config
from pesc.crafting.families import decoder_layers, ffn_name
from pesc.crafting.skeleton import names_in_model, skeleton_of, tied_names
from pesc.method.extend import Extension, extended
from pesc.storage.compare import TensorDifferences
from pesc.vllm_plugin.experts import CraftedFFN, craft_ffn
from pesc.vllm_plugin.plugin import PREFIX

_OURS = re.compile(r"\.(\d+)\.\w+\.(router\.weight|experts\.(?:up_proj|gate_up_proj|down_proj))$")


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    dense = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    return extended(dense, _Crafted)


class _Crafted(Extension, nn.Module):
    """Extends a vLLM causal LM: routers and experts behind its FFNs, and strict loading."""

    prefix = PREFIX

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.crafted_config = vllm_config.model_config.hf_config
        self.crafted_ffns = add_experts(self, self.crafted_config)
        self.checks_dense_names = vllm_config.quant_config is None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Dense tensors by the family's own loader, routers and experts here.

        Args:
            weights: every tensor of the checkpoint by its name on disk.

        Returns:
            Names of the parameters that were loaded.

        Raises:
            ValueError: listing every missing, unexpected and misshapen tensor at once.
        """
        check = _Check(self.crafted_config, dense=self.checks_dense_names)
        loaded: set[str] = set()
        loaded |= super().load_weights(self._dense_only(check.passing(weights), loaded)) or set()  # type: ignore[misc]
        if self.checks_dense_names:
            # vLLM's own check passes over linear maps and embeddings.
            check.missing |= {name for name, _ in self.named_parameters()} - loaded
        check.finish()
        return loaded

    def _dense_only(
        self, weights: Iterable[tuple[str, torch.Tensor]], loaded: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            ours = _OURS.search(name)
            if ours is None:
                yield name, tensor
            # Layers of other pipeline stages are not in the dict.
            elif (found := self.crafted_ffns.get(int(ours[1]))) is not None:
                path, ffn = found
                ffn.load(ours[2], tensor)
                loaded.add(f"{path}.{ours[2]}")


class _Check:
    """Compares the tensors of a checkpoint with those of the transformers model that its config describes."""

    def __init__(self, hf_config: Any, *, dense: bool) -> None:
        config = copy.deepcopy(hf_config)
        settings = PescConfig.from_dict(vars(config).pop("pesc"))
        # vLLM's fallback for families without a class of its own sets this to an implementation of vLLM's.
        config._attn_implementation = None
        self.skeleton = skeleton_of(crafted_config(config, settings))
        # Quantized dense weights have other names and shapes, which vLLM's quantization checks itself.
        self.dense = dense
        self.shapes = {name: list(value.shape) for name, value in self.skeleton.state_dict().items()}
        self.missing = {name for name, _ in self.skeleton.named_parameters() if dense or _OURS.search(name)}
        self.missing -= tied_names(self.skeleton)
        self.differences = TensorDifferences()

    def passing(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that fit; the others are noted for `finish`."""
        for name, tensor in weights:
            in_model = names_in_model(self.skeleton, [name])[name]
            self.missing.discard(in_model)
            expected, found = self.shapes.get(in_model), list(tensor.shape)
            # Buffers that older checkpoints hold; every model computes them itself.
            known = name.endswith("rotary_emb.inv_freq") or (not self.dense and not _OURS.search(name))
            if known or expected == found:
                yield name, tensor
            elif expected is None:
                self.differences.unexpected.append(name)
            else:
                self.differences.misshapen[name] = found, expected

    def finish(self) -> None:
        """Raise ValueError if any tensor was missing, unexpected or misshapen."""
        self.differences.missing = sorted(self.missing)
        self.differences.refuse("the checkpoint does not hold this crafted model")


def add_experts(model: nn.Module, hf_config: Any) -> dict[int, tuple[str, CraftedFFN]]:
    """Give the FFNs of a vLLM model their routers and experts, in place.

    Args:
        model: a vLLM causal LM of a dense family, or the part of it that this pipeline stage holds.
        hf_config: `dense_view` of the crafted model's config.

    Returns:
        (path in the model, module) of each crafted FFN here, by layer index.

    Raises:
        ValueError: when the model's FFNs cannot be found by their structure.
    """
    pesc_config, text_config = PescConfig.from_dict(hf_config.pesc), hf_config.get_text_config()
    path, layers = decoder_layers(model, text_config.num_hidden_layers)
    found = {}
    for index, settings in pesc_config.for_layers(text_config.num_hidden_layers).items():
        layer = layers[index]
        # A pipeline stage holds empty places for the layers of the others.
        if any(True for _ in layer.parameters()):
            name = _ffn_name(layer, f"{path}.{index}", text_config.hidden_size)
            ffn = craft_ffn(layer.get_submodule(name), settings, text_config.hidden_size)
            found[index] = f"{path}.{index}.{name}", ffn
    return found


def _ffn_name(layer: nn.Module, path: str, hidden_size: int) -> str:
    try:
        return ffn_name(layer, path, hidden_size, linear_shape=_linear_shape, attention=(AttentionLayerBase,))
    except ValueError as error:
        raise ValueError(
            f"{error}. vLLM builds this family in a way that experts cannot be added to: serve it with transformers "
            "(pesc serve)"
        ) from error


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    return (module.input_size, module.output_size) if isinstance(module, LinearBase) else None
