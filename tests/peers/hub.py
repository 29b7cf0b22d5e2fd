"""A folder in place of the hub: tiny models under the names that other projects' tests ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft.utils import constants
from transformers import AutoModelForCausalLM, PreTrainedConfig

from checkpoints import tiny_tokenizer
from families import disturb
from pesc import PescConfig, craft
from pesc.config import MODEL_TYPE

ON_THE_HUB = "it needs a model or data set that only the hub has"


def save_models(folder: Path, configs: Mapping[str, PreTrainedConfig], pesc: PescConfig | None) -> Path:
    """Save a random model for each name, with a tokenizer; with `pesc`, crafted, and with experts that matter.

    A test that runs in `folder` finds them by name, since transformers looks for a local folder first.
    """
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if pesc:
            disturb(craft(model, pesc), std=0.1)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def give_default_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give crafted models the `target_modules` that peft gives a Llama.

    peft chooses them by `model_type`, and asks for `target_modules` where it has none: one type, "pesc", covers all
    families.
    """
    for name, defaults in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO") and "llama" in defaults:
            monkeypatch.setitem(defaults, MODEL_TYPE, defaults["llama"])
