"""Tiny checkpoints in the published layouts: the fixtures, and others made from crafted models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from families import disturb, tiny_model
from pesc import PescConfig, craft

FIXTURES = Path(__file__).parent / "fixtures"
CAMELIDAE, SPARSETRAL = FIXTURES / "camelidae-8x", FIXTURES / "sparsetral-16x"
GATED = {"adapter_placement": "parallel", "adapter_activation": "swiglu"}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 5e5,
    },
}
NO_WINDOW = {"sliding_window": None}


def crafted(
    folder: Path, family: str = "llama", dense: dict[str, Any] | None = None, **settings: Any
) -> PreTrainedModel:
    """A tiny crafted model with experts that matter, saved in a folder."""
    base = tiny_model(family)
    if dense:
        torch.manual_seed(0)
        base = type(base)(type(base.config).from_dict(base.config.to_dict() | dense)).eval()
    method = {"num_experts": 4, "adapter_dim": 8, "adapter_scaling": 0.25} | settings
    model = disturb(craft(base, PescConfig(**method))).eval()
    model.save_pretrained(folder)
    return model


def disturbed(folder: Path, family: str, dense: dict[str, Any], **method: Any) -> Path:
    """A crafted folder whose norms and biases are far from their initial values, and whose logits are far apart."""
    model = crafted(folder / "ours", family, dense, **GATED | method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif "norm" in name:
                parameter.uniform_(0.2, 2.0)
            elif "experts" not in name and "router" not in name:
                parameter.mul_(5)
    model.save_pretrained(folder / "ours")
    return folder / "ours"


class Checkpoint:
    """A copy of a fixture to change: its config and its tensors."""

    def __init__(self, fixture: Path = CAMELIDAE) -> None:
        self.config: dict[str, Any] = json.loads((fixture / "config.json").read_text())
        self.tensors = load_file(fixture / "model.safetensors")

    def without(self, *parts: str) -> Checkpoint:
        """Drop every tensor whose key holds one of these."""
        self.tensors = {k: v for k, v in self.tensors.items() if not any(part in k for part in parts)}
        return self

    def save(self, folder: Path, shards: int = 1, *, as_bin: bool = False, legacy: bool = False) -> Path:
        """Write the folder, its tensors dealt to the shards in turn."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        stem, suffix = ("pytorch_model", "bin") if as_bin else ("model", "safetensors")
        names = list(self.tensors)
        files = {f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}": names[i::shards] for i in range(shards)}
        if shards == 1:
            files = {f"{stem}.{suffix}": names}
        for file, keys in files.items():
            part = {key: self.tensors[key].clone() for key in keys}
            if as_bin:
                torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
            else:
                save_file(part, folder / file, {"format": "pt"})
        if shards > 1:
            weight_map = {key: file for file, keys in files.items() for key in keys}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder
