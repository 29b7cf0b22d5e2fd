"""Crafted models as vLLM classes: vLLM's own class of the dense family, its FFNs extended in place.

`PescLlamaForCausalLM` and its like are made when first asked for, one for each dense class; vLLM's registry asks for
them by name.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.registry import ModelRegistry

from pesc.config import PescConfig
from pesc.crafting.configuration import crafted_config
from pesc.crafting.skeleton import names_in_model
from pesc.vllm_plugin.experts import CraftedFFN, craft_ffn
from pesc.vllm_plugin.plugin import PREFIX

_OURS = re.compile(r"\.(\d+)\.\w+\.(router\.weight|experts\.(?:up_proj|gate_up_proj|down_proj))$")


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return crafted_class(name.removeprefix(PREFIX))


@functools.cache
def crafted_class(dense_name: str) -> type[nn.Module]:
    """The vLLM class of the crafted models of a dense architecture, such as "LlamaForCausalLM"."""
    dense = ModelRegistry.models[dense_name].load_model_cls()
    return type(PREFIX + dense_name, (_Crafted, dense), {"__module__": __name__})


class _Crafted(nn.Module):
    """Extends a vLLM causal LM: routers and experts behind its FFNs, and strict loading."""

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
        with torch.device("meta"):
            self.skeleton = skeleton = AutoModelForCausalLM.from_config(crafted_config(config, settings))
        # Quantized dense weights have other names and shapes, which vLLM's quantization checks itself.
        self.dense = dense
        self.shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
        tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
        self.missing = {name for name, _ in skeleton.named_parameters() if dense or _OURS.search(name)} - tied
        self.problems: list[str] = []

    def passing(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that fit; the others are noted for `finish`."""
        for name, tensor in weights:
            in_model = names_in_model(self.skeleton, [name])[name]
            self.missing.discard(in_model)
            expected = self.shapes.get(in_model)
            # Buffers that older checkpoints hold; every model computes them itself.
            known = name.endswith("rotary_emb.inv_freq") or (not self.dense and not _OURS.search(name))
            if known or expected == tuple(tensor.shape):
                yield name, tensor
            elif expected is None:
                self.problems.append(f"  unexpected: {name}")
            else:
                shapes = f"{list(tensor.shape)} in the file, {list(expected)} by the config"
                self.problems.append(f"  wrong shape: {name} is {shapes}")

    def finish(self) -> None:
        """Raise ValueError if any tensor was missing, unexpected or misshapen."""
        lines = [f"  missing: {name}" for name in sorted(self.missing)] + sorted(self.problems)
        if lines:
            raise ValueError("the checkpoint does not hold this crafted model:\n" + "\n".join(lines))


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
    text_config = hf_config.get_text_config()
    layers = PescConfig.from_dict(hf_config.pesc).for_layers(text_config.num_hidden_layers)
    found = {}
    for index, path, layer in _decoder_layers(model, text_config.num_hidden_layers):
        if index in layers:
            name = _ffn_name(path, layer, text_config.hidden_size)
            ffn = craft_ffn(layer.get_submodule(name), layers[index], text_config.hidden_size)
            found[index] = (f"{path}.{name}", ffn)
    return found


def _decoder_layers(model: nn.Module, count: int) -> Iterator[tuple[int, str, nn.Module]]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(name, module) for name, module in lists if len(module) == count]
    if not fitting:
        raise ValueError(
            f"{type(model).__name__}: looked for a ModuleList of num_hidden_layers ({count}) decoder layers; found "
            + (", ".join(f"{name} ({len(module)})" for name, module in lists) or "none")
        )
    path, layers = fitting[0]
    for index, layer in enumerate(layers):
        # A pipeline stage holds empty places for the layers of the others.
        if any(True for _ in layer.parameters()):
            yield index, f"{path}.{index}", layer


def _ffn_name(path: str, layer: nn.Module, hidden_size: int) -> str:
    names = [name for name, child in layer.named_children() if _is_ffn(child, hidden_size)]
    if len(names) != 1:
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
        raise ValueError(
            f"looked in {path} ({type(layer).__name__}) for one child with linear maps from and to hidden_size "
            f"({hidden_size}) whose forward takes the hidden states alone; {len(names)} fit. Found: {children}. vLLM "
            "builds this family in a way that experts cannot be added to: serve it with transformers (pesc serve)"
        )
    return names[0]


def _is_ffn(module: nn.Module, hidden_size: int) -> bool:
    if any(isinstance(child, AttentionLayerBase) for child in module.modules()):
        return False
    linears = [child for child in module.modules() if isinstance(child, LinearBase)]
    reads = any(linear.input_size == hidden_size for linear in linears)
    writes = any(linear.output_size == hidden_size for linear in linears)
    catch_all = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    taken = [p for p in inspect.signature(module.forward).parameters.values() if p.kind not in catch_all]
    return len(linears) >= 2 and reads and writes and len(taken) == 1
