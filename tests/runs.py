"""Small training runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import tiny_dense, write_rows
from pesc import PescConfig
from pesc.data.settings import DataSettings
from pesc.training.recipe import LoraSettings, ModelSettings, OutputSettings, Recipe, TrainingSettings
from pesc.training.trainer import Tuning

PESC = PescConfig(num_experts=4, adapter_dim=8)


def make_recipe(tmp_path: Path, **changes) -> Recipe:
    """A small run; changes are settings of any section by their own name."""
    if not (tmp_path / "dense").exists():
        tiny_dense(tmp_path / "dense")
        write_rows(tmp_path / "rows.jsonl")
    values = {
        "name": str(tmp_path / "dense"),
        "pesc": PESC,
        "lora": LoraSettings(r=4, alpha=8),
        "train": tmp_path / "rows.jsonl",
        "max_length": 128,
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "folder": tmp_path / "run",
        "save_steps": 2,
    } | changes
    values |= {name: str(values[name]) for name in ("train", "eval") if isinstance(values.get(name), Path)}

    def section(settings: Any) -> Any:
        names = [field.name for field in dataclasses.fields(settings) if field.name in values]
        return settings(**{name: values.pop(name) for name in names})

    recipe = Recipe(
        model=section(ModelSettings),
        pesc=values.pop("pesc"),
        lora=values.pop("lora"),
        data=section(DataSettings),
        training=section(TrainingSettings),
        output=section(OutputSettings),
    )
    assert not values
    return recipe


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let a run end in its next forward pass after so many."""
    plain, calls = Tuning.training_step, iter(range(1000))

    def step(self, *args, **kwargs):
        if next(calls) == steps:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Tuning, "training_step", step)
