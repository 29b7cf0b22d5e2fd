"""Recipes: sections of settings, filled from YAML and key=value, strict about both."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import get_args

import pytest
import torch
from rich.console import Console
from transformers import get_scheduler

from checkpoints import tiny_dense, write_pairs, write_rows
from pesc import PescConfig, train
from pesc.demo.demo import demo_recipe
from pesc.training.recipe import Recipe, Scheduler, differences, load_recipe
from runs import metrics

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = "model: {name: m}\ndata: {train: d.jsonl}\noutput: {folder: o}\n"


def recipe(tmp_path: Path, text: str, *changes: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, changes)


def test_a_run_never_takes_the_name_of_its_base(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: org/name}\ndata: {train: rows.jsonl}\noutput: {folder: org/name}\n")
    with pytest.raises(ValueError, match=r"output.folder \(org/name\) must not be model.name"):
        load_recipe(recipe, [])


def test_defaults_and_changes(tmp_path: Path) -> None:
    changes = ["pesc.num_experts=4", "lora.alpha=3", "training.steps=7", "training.learning_rate=1e-3"]
    loaded = recipe(tmp_path, MINIMAL + "lora: {r: 8}\n", *changes, "output.folder=2026-11-24")
    assert loaded.pesc == PescConfig(num_experts=4)
    assert (loaded.lora.r, loaded.lora.alpha, loaded.training.steps) == (8, 3, 7)
    assert (loaded.training.learning_rate, loaded.output.folder) == (1e-3, Path("2026-11-24"))
    assert recipe(tmp_path, "training: {learning_rate: 2e-05}\n" + MINIMAL).training.learning_rate == 2e-5


def test_null_means_without(tmp_path: Path) -> None:
    assert recipe(tmp_path, MINIMAL + "pesc: null\n").pesc is None
    assert recipe(tmp_path, MINIMAL + "pesc: {num_experts: 4}\n", "pesc=null").pesc is None
    assert recipe(tmp_path, MINIMAL + "pesc: null\n", "pesc.num_experts=4").pesc == PescConfig(num_experts=4)
    with pytest.raises(ValueError, match="nothing would train"):
        recipe(tmp_path, MINIMAL, "pesc=null", "lora=null")


@pytest.mark.parametrize(
    ("extra", "changes", "message"),
    [
        ("pecs: {num_experts: 4}\n", [], r"pecs is unknown \(did you mean pesc\?\)"),
        ("pesc: {num_expert: 4}\n", [], r"pesc.num_expert is unknown \(did you mean pesc.num_experts\?\)"),
        ("", ["training.learning_rat=3"], r"did you mean training.learning_rate\?"),
        ("", ["learning_rate=3"], r"learning_rate is unknown \(did you mean training.learning_rate\?\)"),
        ("", ["lora.max_lenght=3"], r"lora.max_lenght is unknown \(did you mean data.max_length\?\)"),
        ("", ["model=m"], r"model \('m'\) must be a section \(name, dtype, quantization\)"),
        ("", ["steps"], "is written key=value"),
        ("", ["--training.steps=3"], "is written key=value"),
        ("", ["training.steps=[3"], "recipe.yaml must be YAML"),
        ("", ["training.seed=4294967296"], r"training.seed \(4294967296\) must be an integer of at least 0 and below"),
        ("training: {batch_size: many}\n", [], r"training.batch_size \('many'\) must be an integer"),
        ("training: {batch_size: '4'}\n", [], r"training.batch_size \('4'\) must be an integer"),
        ("training: {batch_size: true}\n", [], r"training.batch_size \(True\) must be an integer"),
        ("training: {lr_scheduler_type: cosin}\n", [], r"must be one of .* \(did you mean 'cosine'\?\)"),
        ("", ["model.dtype=float16"], r"model.dtype \('float16'\) must be one of float32, bfloat16"),
        (
            "training: {batch_size: 0, steps: 0}\n",
            [],
            r"training.steps \(0\) must be an integer of at least 1, or null; training.batch_size \(0\) must be",
        ),
        ("pesc: {num_experts_per_tok: 9}\n", [], r"pesc.num_experts_per_tok \(9\) must be at most num_experts \(8\)"),
        (
            "lora: {alpha: 0, dropout: 2}\ntraining: {seed: -1}\n",
            [],
            r"lora.alpha \(0\).*lora.dropout \(2\).*training.seed \(-1\)",
        ),
        ("lora: {r: 0}\n", [], r"lora.r \(0\) must be an integer of at least 1"),
        ("lora: {target_modules: []}\n", [], r"lora.target_modules \(\[\]\) must be a non-empty list of texts"),
        ("training: {dpo_beta: 0.3}\n", [], r"training.dpo_beta \(0.3\) needs objective dpo"),
        (
            "training: {objective: dpo}\n",
            ["data.packing=true"],
            r"data.packing \(true\) must be false with training.obj",
        ),
        ("pesc: [\n", [], "recipe.yaml must be YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, extra: str, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, MINIMAL + extra, *changes)


def test_missing_settings_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.name is missing; data.train is missing"):
        recipe(tmp_path, "output: {folder: o}\n")
    with pytest.raises(ValueError, match="must be a section"):
        recipe(tmp_path, "")
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_saved_recipes_load_equal(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, MINIMAL + "pesc: {num_experts: [2, 4], layers: [0, 1]}\nlora: null\n")
    loaded.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == loaded
    loaded = recipe(tmp_path, MINIMAL + "lora: {target_modules: [q_proj]}\n", "output.folder=~/x")
    loaded.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == loaded
    assert loaded.lora.target_modules == ["q_proj"]
    assert loaded.output.folder == Path.home() / "x"


@pytest.mark.parametrize(
    "changes",
    [
        ["output.folder=elsewhere", "output.save_steps=1"],
        ["training.gradient_checkpointing=true"],
        ["data.train=/elsewhere/d.jsonl"],
        ["lora.alpha=16.0"],
    ],
)
def test_what_does_not_change_the_result_makes_no_difference(tmp_path: Path, changes: list[str]) -> None:
    assert differences(recipe(tmp_path, MINIMAL, *changes), recipe(tmp_path, MINIMAL)) == []


def test_what_changes_the_result_is_named_with_both_values(tmp_path: Path) -> None:
    changed = recipe(tmp_path, MINIMAL, "training.seed=1", "pesc.num_experts=4", "data.max_length=3")
    assert differences(changed, recipe(tmp_path, MINIMAL)) == [
        "pesc.num_experts: 8 there, 4 asked for",
        "data.max_length: 2048 there, 3 asked for",
        "training.seed: 0 there, 1 asked for",
    ]
    [difference] = differences(recipe(tmp_path, MINIMAL, "lora=null"), recipe(tmp_path, MINIMAL))
    assert difference.startswith("lora: {'r': 64,") and difference.endswith("} there, None asked for")


def test_a_models_folder_may_be_written_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    relative, absolute = (recipe(tmp_path, MINIMAL, f"model.name={name}") for name in ("base", tmp_path / "base"))
    assert differences(relative, absolute) == []
    assert differences(relative, recipe(tmp_path, MINIMAL, "model.name=other"))


def test_every_scheduler_needs_no_settings_of_its_own() -> None:
    for name in get_args(Scheduler):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=3)
        optimizer.step()


def test_the_recipe_in_the_repository_is_the_demos() -> None:
    assert load_recipe(RECIPES / "demo.yaml") == demo_recipe(Path("runs/demo"))


def test_the_recipe_in_the_repository_explains_every_setting() -> None:
    text = (RECIPES / "demo.yaml").read_text()
    for section in dataclasses.asdict(load_recipe(RECIPES / "demo.yaml")).values():
        for name in section:
            [line] = [line for line in text.splitlines() if line.startswith(f"  {name}: ")]
            assert "# " in line


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_trains_a_tiny_model_on_a_few_rows_in_place_of_its_own(tmp_path: Path, path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_dense(tmp_path / "dense")
    write = write_pairs if load_recipe(path).training.objective == "dpo" else write_rows
    rows = write(tmp_path / "rows.jsonl", 48)
    changes = [f"model.name={tmp_path / 'dense'}", f"data.train={rows}", "data.decontaminate=null"]
    changes += [f"output.folder={tmp_path / 'run'}", "training.steps=2", "training.gradient_accumulation_steps=2"]
    train(load_recipe(path, changes), Console(file=io.StringIO()))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
