"""Health: what is not finite stops a run, starved experts are named, and all that trains is shown to have moved."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from checkpoints import tiny_tokenizer
from pesc import PescConfig, train
from pesc.cli import main
from pesc.crafting.surgery import crafted_ffns
from pesc.interop.formats import export
from pesc.method.router import Router
from pesc.training import health
from pesc.training.health import movement, starting_point, starved, tell_movement
from pesc.training.train import build_model
from pesc.training.trainer import PescTrainer
from runs import interrupt_after, make_recipe, metrics


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_take_it_in(
    tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str], packing: bool
) -> None:
    """A learning rate of 1e30: the first step overflows every weight, the second loss is no number."""
    changes = {"learning_rate": 1e30, "max_grad_norm": 1e30, "save_steps": 1, "batch_size": 1, "packing": packing}
    make_recipe(tmp_path, **changes).save(tmp_path / "recipe.yaml")
    capsys.readouterr()
    for _ in range(2):
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("pesc: step 2: the loss is nan, computed on ") and error.count("\n") == 1
        assert re.search(r"rows.jsonl, row \d+(, \d+)+\. " if packing else r"rows.jsonl, row \d+\. ", error)
        assert f"the last good checkpoint, {tmp_path}/run/checkpoints/checkpoint-1," in error
        assert "lower training.learning_rate" in error
        assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("c*")] == ["checkpoint-1"]
        assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(("accumulate", "step"), [(1, 3), (2, 8)])
def test_a_gradient_that_is_not_finite_names_its_step_and_its_rows(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, accumulate: int, step: int
) -> None:
    """Step 8 of 2 batches lies in the third epoch: 12 examples are 3 such steps."""
    plain, seen = PescTrainer.training_step, []

    def spoiled(self: Any, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        seen.append(inputs["input_ids"].tolist())
        loss = plain(self, model, inputs, *args)
        if len(seen) == accumulate * step:
            crafted_ffns(self.model)[0][1].router.weight.grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(PescTrainer, "training_step", spoiled)
    recipe = make_recipe(tmp_path, gradient_accumulation_steps=accumulate, steps=10, save_steps=2)
    with pytest.raises(ValueError, match=f"step {step}: the norm of the gradient is inf") as caught:
        train(recipe, console)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    named = [int(row) for row in str(caught.value).partition("rows.jsonl, row ")[2].partition(".")[0].split(", ")]
    assert len(named) == 2 * accumulate
    trained = [text for batch in seen[-accumulate:] for text in tiny_tokenizer().batch_decode(batch)]
    assert all(rows[row - 1][1]["content"] in text for row, text in zip(named, trained, strict=True))
    assert f"checkpoint-{(step - 1) // 2 * 2}," in str(caught.value)


def test_the_first_step_has_no_checkpoint_to_go_back_to(tmp_path: Path, console: Console) -> None:
    recipe = make_recipe(tmp_path, learning_rate=1e30, max_grad_norm=1e30, save_steps=500)
    with pytest.raises(ValueError, match="goes on from the start and meets step 2 again"):
        train(recipe, console)


def test_starved_experts_are_those_below_a_hundredth_of_an_even_share() -> None:
    layers = PescConfig(num_experts=[4, 4, 4, 2], layers=[0, 3, 5, 6]).for_layers(8)
    even, dead, collapsed, all_of_them = [100] * 4, [400, 398, 401, 1], [600, 590, 5, 5], [600, 600]
    counts = [torch.tensor(count) for count in (even, dead, collapsed, all_of_them)]
    assert starved(counts, layers) == {"collapsed_layers": [5], "dead_experts": {"3": [3]}}
    assert starved([torch.tensor([300, 300, 297, 3])], {0: layers[0]})["dead_experts"] == {}
    assert starved([torch.tensor([300, 300, 298, 2])], {0: layers[0]})["dead_experts"] == {"0": [3]}


def test_a_starved_expert_is_named_once_and_counted_over_an_interruption(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last expert's logit is the mean of the others': it is never the largest."""

    def starve(router: Router) -> None:
        router.weight.data.normal_()
        router.weight.data[-1] = router.weight.data[:-1].mean(dim=0)

    monkeypatch.setattr("pesc.training.trainer.WINDOW", 4)
    monkeypatch.setattr(Router, "reset_parameters", starve)
    pesc = PescConfig(num_experts=4, num_experts_per_tok=1, adapter_dim=8)
    changes = {"pesc": pesc, "steps": 8, "save_steps": 3, "learning_rate": 1e-9}
    train(make_recipe(tmp_path, folder=tmp_path / "whole", **changes), console)
    told = [line for line in console.file.getvalue().splitlines() if "next to no tokens" in line]
    assert len(told) == 1
    assert told[0].startswith("step 4: layer 0, expert 3: next to no tokens; layer 1, expert 3: next to no tokens. ")
    assert "router_aux_loss_coef" in told[0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 6)
        train(make_recipe(tmp_path, **changes), console)
    train(make_recipe(tmp_path, **changes), console)
    found = [[line.get("dead_experts") for line in metrics(tmp_path / name)] for name in ("whole", "run")]
    dead = {"0": [3], "1": [3]}
    assert found[0] == found[1] == [None, None, None, dead, None, None, None, dead]
    assert "of 2 routers and 8 experts, 2 have not moved" in console.file.getvalue()


def test_a_balanced_run_warns_of_nothing(tmp_path: Path, console: Console) -> None:
    train(make_recipe(tmp_path, steps=health.WINDOW, save_steps=500), console)
    last = metrics(tmp_path / "run")[-1]
    assert last["collapsed_layers"] == [] and last["dead_experts"] == {}
    assert "learns nothing" not in console.file.getvalue()


def test_a_run_shows_how_far_its_routers_and_experts_have_moved(tmp_path: Path, console: Console) -> None:
    recipe = make_recipe(tmp_path)
    start = {name: value.detach().clone() for name, value in build_model(recipe).named_parameters()}
    end = load_file(train(recipe, console) / "adapter.safetensors")
    assert "all 2 routers and 8 experts have moved" in console.file.getvalue()
    moved = json.loads((tmp_path / "run" / "summary.json").read_text())["moved"]
    assert set(moved) == {f"model.layers.{n}.mlp.{part}" for n in (0, 1) for part in ("router", "experts")}
    for place, value in moved.items():
        if place.endswith("router"):
            before, after = start[f"{place}.weight"], end[f"{place}.weight"]
            assert value == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-6)
        else:
            assert value == pytest.approx([each.norm().item() for each in end[f"{place}.down_proj"]], rel=1e-6)


def test_movement_is_counted_from_where_a_crafted_base_starts(tmp_path: Path, console: Console) -> None:
    train(make_recipe(tmp_path), console)
    export(tmp_path / "run", tmp_path / "crafted", "pesc")
    again = make_recipe(tmp_path, name=str(tmp_path / "crafted"), folder=tmp_path / "again", steps=2)
    start = starting_point(build_model(again))
    for value in movement(start, train(again, console)).values():
        assert all(0 < each < 0.5 for each in (value if isinstance(value, list) else [value]))


def test_what_has_not_moved_is_named() -> None:
    moved = {"a.router": 0.0, "a.experts": [0.5, 0.0], "b.router": 0.1, "b.experts": [0.5, 0.5]}
    assert tell_movement(moved) == (
        "of 2 routers and 4 experts, 2 have not moved, since no token has reached them: a.router, a.experts.1"
    )
