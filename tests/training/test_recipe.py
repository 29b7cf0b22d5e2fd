"""Recipes: one dataclass, filled from YAML and key=value, strict about both."""

from __future__ import annotations

from pathlib import Path

import pytest

from pesc import PescConfig
from pesc.demo.demo import demo_recipe
from pesc.training.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = "model: m\noutput: o\ntrain_data: d.jsonl\n"


def recipe(tmp_path: Path, text: str, *changes: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, changes)


def test_defaults_and_changes(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, MINIMAL + "lora: {r: 8}\n", "method.num_experts=4", "lora.alpha=3", "steps=7")
    assert loaded.method == PescConfig(num_experts=4)
    assert (loaded.lora.r, loaded.lora.alpha, loaded.steps, loaded.output) == (8, 3, 7, Path("o"))


def test_null_means_without(tmp_path: Path) -> None:
    assert recipe(tmp_path, MINIMAL + "method: null\n").method is None
    assert recipe(tmp_path, MINIMAL + "method: {num_experts: 4}\n", "method=null").method is None
    with pytest.raises(ValueError, match="nothing would train"):
        recipe(tmp_path, MINIMAL, "method=null", "lora=null")


@pytest.mark.parametrize(
    ("extra", "changes", "message"),
    [
        ("metod: {num_experts: 4}\n", [], r"Did you mean.*method"),
        ("method: {num_expert: 4}\n", [], r"Did you mean method.num_experts"),
        ("", ["learning_rat=3"], "Did you mean learning_rate"),
        ("", ["steps"], "is written key=value"),
        ("", ["--steps=3"], "is written key=value"),
        ("batch_size: many\n", [], 'unable to convert "many" into int'),
        ("dtype: float16\n", [], "Choose from"),
        ("batch_size: 0\nsteps: 0\n", [], r"steps \(0\) must be at least 1; batch_size \(0\) must be at least 1"),
        ("method: {num_experts_per_tok: 9}\n", [], r"num_experts_per_tok \(9\) must be at most num_experts \(8\)"),
        ("lora: {alpha: 0, dropout: 2}\nseed: -1\n", [], r"seed \(-1\).*lora.alpha \(0.0\).*lora.dropout \(2.0\)"),
        ("lora: {r: 0}\n", [], r"lora.r \(0\) must be at least 1"),
        ("data: [\n", [], "recipe.yaml"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, extra: str, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, MINIMAL + extra, *changes)


def test_missing_settings_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model"):
        recipe(tmp_path, "output: o\n")
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_saved_recipes_load_equal(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, MINIMAL + "method: {num_experts: [2, 4], layers: [0, 1]}\nlora: null\n")
    loaded.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == loaded
    loaded = recipe(tmp_path, MINIMAL + "lora: {target_modules: [q_proj]}\n", "output=~/x")
    loaded.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == loaded
    assert loaded.lora.target_modules == ["q_proj"]
    assert loaded.output == Path.home() / "x"


def test_the_recipe_in_the_repository_is_the_demos() -> None:
    assert load_recipe(RECIPES / "demo.yaml") == demo_recipe(Path("runs/demo"))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_all_recipes_load(path: Path) -> None:
    assert load_recipe(path).model
