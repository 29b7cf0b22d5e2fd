"""Held-out data while training: the loss is that of the definition, it disturbs nothing, and the best step is kept."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from checkpoints import tiny_tokenizer
from pesc import load, train
from pesc.cli import main
from pesc.data.chat import IGNORE_INDEX, encode_conversation
from pesc.data.settings import SourceSettings
from pesc.training.loss import summed_loss
from pesc.training.recipe import LoraSettings, Recipe, load_recipe
from pesc.training.trainer import PescTrainer
from runs import interrupt_after, make_recipe, metrics

STEEP = {"learning_rate": 0.03, "max_grad_norm": 5.0}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def write_held_out(path: Path, answers: str, count: int = 5) -> Path:
    """Conversations of the training data's form, with other answers."""
    turns = [("user", "count to {}"), ("assistant", answers)]
    rows = [{"messages": [{"role": role, "content": text.format(n + 1)} for role, text in turns]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sources(tmp_path: Path) -> list[SourceSettings]:
    near = write_held_out(tmp_path / "near.jsonl", "1 2 {}")
    far = write_held_out(tmp_path / "far.jsonl", "Ab%{} $dE ~#")
    return [SourceSettings(path=str(near)), SourceSettings(path=str(far), rows=3)]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "held_out" in line]


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of steps, without times."""
    timed = ("elapsed", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics(run) if "loss" in line]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU path", "GPU path"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_loss_is_that_of_each_labelled_token(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, packing: bool, on_cpu: bool
) -> None:
    monkeypatch.setattr(PescTrainer, "scores_labelled_positions", on_cpu)
    path = write_held_out(tmp_path / "near.jsonl", "1 2 {}")
    train(make_recipe(tmp_path, eval=path, eval_steps=2, steps=3, packing=packing), console)
    [first, last] = evaluations(tmp_path / "run")
    assert (first["step"], last["step"]) == (2, 3)
    assert summary(tmp_path / "run")["best_step"] == 3
    model, total, tokens = load(tmp_path / "run", folded=False), 0.0, 0
    for row in path.read_text().splitlines():
        [(ids, labels)] = encode_conversation(json.loads(row), tiny_tokenizer())
        with torch.no_grad():
            total += summed_loss(model, torch.tensor([labels]), input_ids=torch.tensor([ids])).item()
        tokens += sum(label != IGNORE_INDEX for label in labels[1:])
    assert last["held_out"] == {"near": pytest.approx(total / tokens, rel=1e-5)}
    assert last["tokens"] == metrics(tmp_path / "run")[-2]["tokens"]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_evaluations_change_nothing_of_a_run(tmp_path: Path, console: Console, packing: bool) -> None:
    changes = {"lora": LoraSettings(r=4, dropout=0.2), "steps": 8, "packing": packing}
    train(make_recipe(tmp_path, folder=tmp_path / "without", **changes), console)
    train(make_recipe(tmp_path, **changes, eval=sources(tmp_path), eval_steps=1), console)
    assert steps(tmp_path / "run") == steps(tmp_path / "without")
    means = [sum(line["held_out"].values()) / 2 for line in evaluations(tmp_path / "run")]
    assert len(means) == 8
    assert summary(tmp_path / "run")["best_held_out_loss"] == pytest.approx(min(means))


def overtrained(tmp_path: Path, **changes: Any) -> Recipe:
    """A run whose held-out loss soon rises."""
    [_, far] = sources(tmp_path)
    values = {"eval": [far], "eval_steps": 2, "steps": 16, "save_steps": 3, **STEEP}
    return make_recipe(tmp_path, **values | changes)


def test_the_adapter_is_that_of_the_lowest_loss(tmp_path: Path, console: Console) -> None:
    best = load_file(train(overtrained(tmp_path), console) / "adapter.safetensors")
    losses = {line["step"]: line["held_out"]["far"] for line in evaluations(tmp_path / "run")}
    said, shown = summary(tmp_path / "run"), console.file.getvalue()
    assert list(losses) == list(range(2, 17, 2))
    assert said["best_step"] == min(losses, key=losses.__getitem__) < 12  # the last two checkpoints are of 15 and 16
    assert said["best_held_out_loss"] == pytest.approx(losses[said["best_step"]])
    assert said["steps"] == 16
    assert f"step 2: held-out loss {losses[2]:.4f}, the lowest so far (far {losses[2]:.4f})" in shown
    assert f"the adapter is that of step {said['best_step']}, with the lowest held-out loss: " in shown
    recipe = make_recipe(tmp_path, steps=said["best_step"], folder=tmp_path / "shorter", **STEEP)
    shorter = load_file(train(recipe, console) / "adapter.safetensors")
    assert all(torch.equal(best[name], shorter[name]) for name in best)


def test_training_ends_when_nothing_improves(tmp_path: Path, console: Console) -> None:
    train(overtrained(tmp_path, early_stopping_patience=2), console)
    said = summary(tmp_path / "run")
    assert said["steps"] == said["best_step"] + 4 == evaluations(tmp_path / "run")[-1]["step"] < 16
    assert f"stopped early after step {said['steps']} of 16; the adapter is that of step" in console.file.getvalue()


def test_evaluations_leave_a_quantized_base_as_it_is(tmp_path: Path, console: Console) -> None:
    pytest.importorskip("bitsandbytes")
    for name, changes in {"alone": {"eval": None, "eval_steps": None}, "measured": {}}.items():
        train(overtrained(tmp_path, folder=tmp_path / name, quantization="nf4", **changes), console)
    assert steps(tmp_path / "alone") == steps(tmp_path / "measured")


@pytest.mark.parametrize("forward_passes", [1, 5, 6, 7, 9])
def test_a_resumed_run_with_evaluations_equals_its_twin(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, forward_passes: int
) -> None:
    changes = {"early_stopping_patience": 2, "lora": LoraSettings(r=4, dropout=0.2)}
    train(overtrained(tmp_path, folder=tmp_path / "whole", **changes), console)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, forward_passes)
        train(overtrained(tmp_path, **changes), console)
    _equal_twins(tmp_path, overtrained(tmp_path, **changes), console)


def test_an_interruption_after_an_early_stop_adds_no_step(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    train(overtrained(tmp_path, folder=tmp_path / "whole", early_stopping_patience=2), console)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pesc.training.train.write_json", interrupted)
        train(overtrained(tmp_path, early_stopping_patience=2), console)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        _equal_twins(tmp_path, overtrained(tmp_path, early_stopping_patience=2), console)


def _equal_twins(tmp_path: Path, recipe: Recipe, console: Console) -> None:
    one, other = (
        load_file(tmp_path / "whole" / "adapter" / "adapter.safetensors"),
        load_file(train(recipe, console) / "adapter.safetensors"),
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert steps(tmp_path / "whole") == steps(tmp_path / "run")
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "run")
    untimed = [
        {key: value for key, value in summary(tmp_path / name).items() if key not in ("seconds", "peak_memory_gb")}
        for name in ("whole", "run")
    ]
    assert untimed[0] == untimed[1]


def test_a_damaged_best_checkpoint_is_no_adapter(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(overtrained(tmp_path, folder=tmp_path / "whole"), console)
    best = summary(tmp_path / "whole")["best_step"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 14)
        train(overtrained(tmp_path), console)
    weights = tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / "adapter" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(
        ValueError, match=rf"checkpoint-{best}, the best of the run, is damaged \(not as it was written"
    ):
        train(overtrained(tmp_path), console)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("data.eval=rows.jsonl", "data.eval needs training.eval_steps: how often to evaluate"),
        ("training.eval_steps=5", r"training.eval_steps \(5\) needs data.eval: what to evaluate on"),
        ("training.early_stopping_patience=2", "early_stopping_patience needs eval_steps"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tmp_path: Path, change: str, problem: str) -> None:
    make_recipe(tmp_path).save(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match=problem):
        load_recipe(tmp_path / "recipe.yaml", [change])


def test_training_data_are_no_held_out_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_recipe(tmp_path, eval_steps=1, eval=tmp_path / "copy.jsonl").save(tmp_path / "recipe.yaml")
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
    assert "copy.jsonl holds what data.train trains on: keep rows apart for it" in capsys.readouterr().err


def test_held_out_data_that_have_changed_are_refused(tmp_path: Path, console: Console) -> None:
    held_out = write_held_out(tmp_path / "near.jsonl", "1 2 {}")
    train(make_recipe(tmp_path, eval=held_out, eval_steps=3), console)
    write_held_out(held_out, "2 {}")
    with pytest.raises(ValueError, match="the data have changed since"):
        train(make_recipe(tmp_path, eval=held_out, eval_steps=3), console)


def test_held_out_rows_without_an_answer_that_fits_are_refused(tmp_path: Path, console: Console) -> None:
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]}) + "\n"
    )
    with pytest.raises(
        ValueError, match=r"data.eval: .*long.jsonl has no example with an answer within data.max_length"
    ):
        train(make_recipe(tmp_path, eval=tmp_path / "long.jsonl", eval_steps=1), console)


def test_sources_of_one_name_keep_their_paths(tmp_path: Path, console: Console) -> None:
    places = [tmp_path / name / "rows.jsonl" for name in ("a", "b")]
    for at, place in enumerate(places):
        place.parent.mkdir()
        write_held_out(place, f"{at} {{}}")
    held_out = [SourceSettings(path=str(place)) for place in places]
    train(make_recipe(tmp_path, eval=held_out, eval_steps=6), console)
    assert list(evaluations(tmp_path / "run")[0]["held_out"]) == [str(place) for place in places]
