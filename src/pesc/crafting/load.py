"""A model on disk as one object: every verb begins with `locate`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pesc.config import MODEL_TYPE, PescConfig
from pesc.crafting.adapter import (
    ADAPTER,
    ADAPTER_JSON,
    AdapterSettings,
    adapter_differences,
    adapter_weights,
    load_adapter_weights,
)
from pesc.crafting.configuration import crafted_config
from pesc.crafting.craft import craft
from pesc.crafting.lora import add_lora, cast_experts, fold
from pesc.crafting.modeling import loading_differences
from pesc.crafting.refusals import refused_in_one_line, sound_config
from pesc.crafting.skeleton import differences_from, skeleton_of
from pesc.crafting.sources import resolve
from pesc.storage.checksums import SMALL, check_checksums
from pesc.storage.compare import TensorDifferences
from pesc.storage.files import copy_companions, refuse_large_text
from pesc.storage.weights import Weights

Kind = Literal["dense", "crafted", "adapter"]
RECIPE = "recipe.yaml"
_MOST_TOKENS = 2**24
_EXPERTS = re.compile(r"\.(router|experts|moe_adapter)\.")


@dataclass(frozen=True)
class ModelRef:
    """A model on disk; `locate` makes one. Files are read when they are asked for.

    An adapter's base is another `ModelRef`; of every other model, `base` is itself.
    """

    name: str
    """As the user gave it."""
    folder: Path
    """Its own files: of an adapter, the adapter's folder."""
    kind: Kind
    """"dense" is every folder with a config.json that is not a crafted model's."""
    base_name: str | None = None
    """The caller's word for the place of an adapter's base, if it moved."""

    @cached_property
    def settings(self) -> AdapterSettings:
        """What an adapter's adapter.json says.

        Raises:
            FileNotFoundError, ValueError: as `AdapterSettings.read` does.
        """
        return AdapterSettings.read(self.folder)

    @cached_property
    def base(self) -> ModelRef:
        """The model with the dense weights and the tokenizer.

        Raises:
            FileNotFoundError: an adapter's base is not there.
        """
        if self.kind != "adapter":
            return self
        base = self.base_name or self.settings.base_model
        try:
            return _standalone(base)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.folder} needs its base {base} (sha256 {self.settings.base_sha256[:12]}…), which is not there: "
                f"{error}; if it moved, name its new place with --base, or pesc.load(…, base=…)"
            ) from error

    @cached_property
    def config(self) -> Any:
        """The transformers config of the model as it will be: with experts, if it has some.

        Raises:
            FileNotFoundError, ValueError: the config is not there, or transformers cannot read it.
        """
        if self.kind != "adapter":
            return self._read_config()
        dense = self.base.config
        if self.settings.pesc is None or self.base.kind == "crafted":
            return dense
        return crafted_config(dense, self.settings.pesc)

    @property
    def run(self) -> Path | None:
        """The folder of the run that made an adapter, with its recipe; None if there is none."""
        places = [self.folder, self.folder.parent] if self.folder.name == ADAPTER else [self.folder]
        recipes = [place for place in places if self.kind == "adapter" and (place / RECIPE).is_file()]
        return recipes[0] if recipes else None

    @property
    def pesc_config(self) -> PescConfig | None:
        """The method's settings; None for a dense model."""
        return self.config.pesc_config if self.config.model_type == MODEL_TYPE else None

    def skeleton(self, *, folded: bool = True) -> PreTrainedModel:
        """The model on the meta device, built once: to be looked at, not changed.

        Args:
            folded: without LoRA.
        """
        tuned = self.kind == "adapter" and self.settings.lora
        return self._tuned_skeleton if tuned and not folded else self._bare_skeleton

    @cached_property
    def _bare_skeleton(self) -> PreTrainedModel:
        return skeleton_of(self.config)

    @cached_property
    def _tuned_skeleton(self) -> PreTrainedModel:
        skeleton = skeleton_of(self.config)
        with refused_in_one_line(f"{self.folder / ADAPTER_JSON}: no model has this LoRA"):
            return add_lora(skeleton, LoraConfig(**self.settings.lora or {}))

    def differences(self, weights: Weights | None = None) -> TensorDifferences:
        """How its files differ from what its config, or an adapter's settings, promise.

        Args:
            weights: its own files, if they are open already.
        """
        weights, skeleton = weights or self.weights(), self.skeleton(folded=False)
        if self.kind != "adapter":
            return differences_from(skeleton, weights)
        return adapter_differences(skeleton, weights)

    def weights(self) -> Weights:
        """The tensors of its own files: of an adapter, without the base's.

        Raises:
            FileNotFoundError, ValueError: as `Weights` does.
        """
        return adapter_weights(self.folder) if self.kind == "adapter" else Weights(self.folder)

    def complete_weights(self) -> Weights:
        """`weights`, after a comparison with the skeleton.

        Raises:
            FileNotFoundError, ValueError: as `weights` does; also listing every difference.
        """
        weights = self.weights()
        promise = "its config describes" if self.kind != "adapter" else "its adapter.json and its base describe"
        self.differences(weights).refuse(f"{self.folder} does not hold the model {promise}")
        return weights

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, padding set for training and generation, with the chat template of an adapter.

        Raises:
            FileNotFoundError: the model has none.
            ValueError: it has no token to pad with, or absurd numbers of tokens.
        """
        folder = self.base.folder
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer("")  # settings of the wrong type show only here
        except Exception as error:  # the package tokenizers raises no narrower class
            reason = " ".join(str(error).split())[:300]
            raise FileNotFoundError(f"{folder} holds no tokenizer that transformers can load ({reason})") from error
        token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
        if number >= _MOST_TOKENS:  # libraries would make room for all numbers below
            raise ValueError(f"{folder}: the tokenizer's number of {token!r} ({number}) must be below {_MOST_TOKENS}")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError(f"{folder}: the tokenizer must name an eos_token or a pad_token in tokenizer_config.json")
        if template := self._own_chat_template:
            tokenizer.chat_template = template
        return tokenizer

    @property
    def _own_chat_template(self) -> str | None:
        return self.settings.chat_template if self.kind == "adapter" else None

    def copy_companions(self, target: Path) -> None:
        """Copy what lies beside the base's weights, tokenizer and licence, and an adapter's chat template."""
        copy_companions(self.base.folder, target)
        if template := self._own_chat_template:
            (target / "chat_template.jinja").write_text(template, encoding="utf-8")

    def load(self, *, folded: bool = False, dtype: str | torch.dtype = "auto", **kwargs: Any) -> PreTrainedModel:
        """The model in memory, in eval mode.

        Args:
            folded: merge an adapter's LoRA into the dense weights.
            dtype: of the base and the experts; "auto" for the base checkpoint's own.
            kwargs: passed to transformers' `from_pretrained` for the base (`device_map`, `quantization_config`, …).

        Raises:
            FileNotFoundError: the model or its base is not there.
            ValueError: the base is not the one that the adapter was trained on, or tensors are missing, unknown or
                misshapen; all of them are listed.
        """
        if self.kind != "adapter":
            return _load_model(self, {"dtype": dtype} | kwargs)
        check_checksums(self.folder)
        self.base.weights()  # what is no checkpoint at all shows before all of it is hashed
        self.settings.check_base(self.base.folder)
        self.complete_weights()
        model = self.base.load(dtype=dtype, **kwargs)
        if self.settings.pesc is not None and self.base.kind == "dense":
            craft(model, self.settings.pesc)
        if self.settings.lora:
            add_lora(model, LoraConfig(**self.settings.lora))
        load_adapter_weights(model, self.folder)
        cast_experts(model)
        # Other libraries look at the name for this very model: trl, for the reference of a preference loss.
        model.adapter_base, model.config.name_or_path = self.base.name, self.name
        with refused_in_one_line(f"{self.folder} cannot be folded into {self.base.folder}"):
            return fold(model.eval()) if folded else model.eval()

    def _read_config(self) -> Any:
        file = self.folder / "config.json"
        with refused_in_one_line(f"{file} is no config that transformers can read"):
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        config.name_or_path = self.name
        return config


def locate(path: str | Path, *, base: str | Path | None = None, pickled: bool = False) -> ModelRef:
    """The model that a path or name means.

    Args:
        path: a run's folder, an adapter's folder, a crafted or dense model's folder, a hub id, or the embedded
            default's name.
        base: the place of an adapter's base, if it moved; its weights must be the same.
        pickled: of a hub model without safetensors, download the `.bin` files.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its config is no JSON object.
    """
    given = Path(path).expanduser()
    # A base may have been trained into a run of its own name: its config.json says that it is a model itself.
    places = (given,) if (given / "config.json").is_file() else (given, given / ADAPTER)
    for folder in places:
        if (folder / ADAPTER_JSON).is_file():
            refuse_large_text(folder / ADAPTER_JSON)
            check_checksums(folder, SMALL)
            return ModelRef(str(path), folder, "adapter", None if base is None else str(base))
    return _standalone(path, pickled=pickled)


def load(
    path: str | Path, *, base: str | Path | None = None, dtype: str | torch.dtype = "auto", **kwargs: Any
) -> PreTrainedModel:
    """Load any model of this package with one call.

    Args:
        path: as for `locate`; of an adapter, its base is loaded and crafted first.
        base: the place of an adapter's base, if it moved; its weights must be the same.
        dtype: of the base and the experts; "auto" for the base checkpoint's own.
        kwargs: passed to transformers' `from_pretrained` for the base.

    Returns:
        The model in eval mode. LoRA stays apart: `fold` merges it.

    Raises:
        FileNotFoundError, ValueError: as `locate` and `ModelRef.load` do.
    """
    return locate(path, base=base).load(dtype=dtype, **kwargs)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of any model that `locate` finds, padding set for training and generation.

    Raises:
        FileNotFoundError: there is no such model, or it has no tokenizer.
    """
    return locate(path).tokenizer()


def _standalone(path: str | Path, *, pickled: bool = False) -> ModelRef:
    folder = resolve(path, pickled=pickled)
    crafted = sound_config(folder).get("model_type") == MODEL_TYPE
    return ModelRef(str(path), folder, "crafted" if crafted else "dense")


def unexpected_experts(differences: TensorDifferences) -> list[str]:
    """Those of the unexpected tensors that no verb leaves aside, as it may old buffers and heads for other tasks."""
    return [name for name in differences.unexpected if _EXPERTS.search(name)]


def _load_model(ref: ModelRef, options: dict[str, Any]) -> PreTrainedModel:
    differences, fault = ref.differences(), f"{ref.folder} does not hold the model its config describes"
    if ref.kind == "dense":
        # With it off, transformers raises at the first kind of problem; the complete list is made below.
        options["ignore_mismatched_sizes"] = True
        differences.unexpected = unexpected_experts(differences)
    if getattr(ref.config, "quantization_config", None):
        differences = TensorDifferences(others=differences.others)
    differences.refuse(fault)
    with refused_in_one_line(f"{ref.folder} cannot be loaded"):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            ref.folder, output_loading_info=True, trust_remote_code=False, **options
        )
    differences = loading_differences(info)
    differences.unexpected = unexpected_experts(differences)
    differences.refuse(fault)
    loaded.config.name_or_path = ref.name
    return loaded.eval()
