"""accelerate's dispatch and offload, on crafted models and on the dense ones.

Its own tests of them need an accelerator where they take a model of transformers, and elsewhere layers of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.utils import compute_module_sizes
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from families import dense_config, tokens
from peers.hub import save_models
from pesc import PescConfig

SPREAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
"""Where the parts of a model lie; "cpu" is also the device that computes."""


class Offload:
    pesc: PescConfig | None

    @pytest.fixture(params=["llama", "gemma2"])
    def folder(self, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
        config = dense_config(request.param, vocab_size=264)
        return save_models(tmp_path, {"model": config}, self.pesc) / "model"

    @pytest.fixture
    def model(self, folder: Path) -> Iterator[PreTrainedModel]:
        """It must give what it gave before; greedy tokens too."""
        model = AutoModelForCausalLM.from_pretrained(folder)
        before = self.run(model)
        yield model
        assert all(torch.equal(one, other) for one, other in zip(before, self.run(model), strict=True))
        assert any(parameter.is_meta for parameter in model.parameters())

    @staticmethod
    def run(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return model(tokens()).logits, model.generate(tokens(), max_new_tokens=5, do_sample=False)

    def test_cpu_offload(self, model: PreTrainedModel) -> None:
        cpu_offload(model, execution_device=torch.device("cpu"))

    def test_cpu_offload_with_buffers(self, model: PreTrainedModel) -> None:
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)

    def test_disk_offload(self, model: PreTrainedModel, tmp_path: Path) -> None:
        disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))

    def test_dispatch_model(self, model: PreTrainedModel, tmp_path: Path) -> None:
        dispatch_model(model, SPREAD, main_device="cpu", offload_dir=str(tmp_path / "offload"))

    def test_load_checkpoint_and_dispatch(self, folder: Path, tmp_path: Path) -> None:
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        empty.tie_weights()
        loaded = load_checkpoint_and_dispatch(empty, str(folder), SPREAD, offload_folder=str(tmp_path / "offload"))
        self.compare(loaded.eval(), folder)

    def test_from_pretrained_with_a_device_map(self, folder: Path, tmp_path: Path) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, device_map=SPREAD, offload_folder=str(tmp_path / "offload")
        )
        self.compare(loaded, folder)

    def test_an_inferred_device_map_splits_no_layer(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        half = compute_module_sizes(model)["model.layers"] // 2
        found = infer_auto_device_map(model, {"cpu": half}, no_split_module_classes=model._no_split_modules)
        assert "disk" in found.values()
        assert not any(name.startswith("model.layers.") and name.count(".") > 2 for name in found)

    def compare(self, loaded: PreTrainedModel, folder: Path) -> None:
        """Compare with the model loaded without offloading."""
        expected = self.run(AutoModelForCausalLM.from_pretrained(folder))
        assert all(torch.equal(one, other) for one, other in zip(expected, self.run(loaded), strict=True))
        assert any(parameter.is_meta for parameter in loaded.parameters())


class TestDense(Offload):
    pesc = None


class TestCrafted(Offload):
    pesc = PescConfig(num_experts=4, adapter_dim=8)
