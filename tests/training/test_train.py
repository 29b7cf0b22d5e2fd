"""Training: it learns, trains what it should, and resumes where it stopped."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import pesc.training.train as training
from checkpoints import write_rows
from definition import assert_same, gradients, step_gradients
from pesc import PescConfig, craft_checkpoint, load, load_tokenizer, train
from pesc.crafting.info import describe
from pesc.crafting.lora import adapter_tensors
from pesc.interop.formats import export
from pesc.training.checkpoints import last_checkpoint
from pesc.training.trainer import PescTrainer
from runs import PESC, interrupt_after, make_recipe, metrics


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_it_learns_and_writes_what_it_says(tmp_path: Path, console: Console) -> None:
    adapter = train(make_recipe(tmp_path, steps=30, save_steps=10, learning_rate=0.03, max_grad_norm=5.0), console)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert sum(line["loss"] for line in lines[-5:]) < 0.8 * sum(line["loss"] for line in lines[:5])
    assert all(0 < line["load_entropy"] <= 1 and line["aux_loss"] >= 3.5 for line in lines)
    assert lines[-1]["tokens"] > lines[0]["tokens"] > 0
    assert describe(adapter).untouched == []
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "adapter",
        "left_out.txt",
        "metrics.jsonl",
        "recipe.yaml",
        "summary.json",
        "train_data.sha256",
    }
    shown = console.file.getvalue()
    assert f"train  1/30  loss {lines[0]['loss']:.3f}  " in shown
    assert f"train  30/30  loss {lines[-1]['loss']:.3f}  " in shown


def test_everything_that_should_train_does_and_nothing_else(tmp_path: Path, console: Console) -> None:
    recipe = make_recipe(tmp_path, pesc=PescConfig(num_experts=2, adapter_dim=8), steps=4)
    start = training.build_model(recipe)
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    train(recipe, console)
    after = dict(load(recipe.output.folder).named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(adapter_tensors(start))


@pytest.mark.parametrize(
    "changes",
    [
        {"pesc": None},
        {"lora": None},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"pesc": PescConfig(num_experts=4, adapter_dim=8, adapter_placement="parallel", adapter_activation="swiglu")},
        {"steps": None, "epochs": 0.5},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_way_to_train_runs(tmp_path: Path, console: Console, changes: dict) -> None:
    recipe = make_recipe(tmp_path, **({"steps": 2} | changes))
    train(recipe, console)
    lines = metrics(tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    assert ("load_entropy" in lines[0]) == (recipe.pesc is not None)
    assert load(recipe.output.folder)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_an_interrupted_run_resumes_to_the_same_end(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_recipe(tmp_path, folder=tmp_path / "whole"), console)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 5)
        train(make_recipe(tmp_path), console)
    assert not (tmp_path / "run" / "adapter").exists()
    resumed = train(make_recipe(tmp_path), console)
    one, other = load_file(whole / "adapter.safetensors"), load_file(resumed / "adapter.safetensors")
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    first, second = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert [line["step"] for line in second] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in first] == [line["tokens"] for line in second]
    assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second], rel=1e-5)


@pytest.mark.parametrize(("accumulate", "steps_before"), [(1, 15), (1, 17), (2, 7)])
def test_a_run_interrupted_in_its_second_epoch_sees_exactly_the_data_that_was_left(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, accumulate: int, steps_before: int
) -> None:
    """23 examples in batches of 2 are 12 forward passes an epoch, the last one of a single example."""
    seen: list[list] = []
    plain = PescTrainer.training_step

    def step(self: Any, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(inputs["input_ids"].tolist())
        return plain(self, model, inputs, *args)

    def run(name: str) -> Path:
        data = write_rows(tmp_path / "more.jsonl", 23)
        changes = {"epochs": 2.0, "steps": None, "save_steps": 1, "gradient_accumulation_steps": accumulate}
        return train(make_recipe(tmp_path, train=data, folder=tmp_path / name, **changes), console)

    monkeypatch.setattr(PescTrainer, "training_step", step)
    stop_at = None
    complete, of_complete = load_file(run("complete") / "adapter.safetensors"), list(seen)
    assert sorted(map(str, of_complete[:12])) != sorted(map(str, of_complete[12:]))
    seen.clear()
    stop_at = steps_before * accumulate
    with pytest.raises(KeyboardInterrupt):
        run("resumed")
    stop_at = None
    resumed = load_file(run("resumed") / "adapter.safetensors")
    assert seen == of_complete
    assert all(torch.equal(complete[name], resumed[name]) for name in complete)


def test_lora_starts_from_the_same_matrices_with_and_without_experts(tmp_path: Path) -> None:
    arms = [training.build_model(make_recipe(tmp_path, pesc=pesc)) for pesc in (None, PESC)]
    dense, crafted = ({n: p for n, p in arm.named_parameters() if "lora_A" in n} for arm in arms)
    assert len(dense) == 14
    assert all(torch.equal(dense[name], crafted[name]) for name in dense)


def test_an_interruption_after_the_last_step_adds_no_step(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_recipe(tmp_path, folder=tmp_path / "whole"), console)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_json", interrupted)
        train(make_recipe(tmp_path), console)
    resumed = train(make_recipe(tmp_path), console)
    one, other = load_file(whole / "adapter.safetensors"), load_file(resumed / "adapter.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


def test_an_interruption_while_a_checkpoint_is_written_resumes(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PescTrainer, "_save_optimizer_and_scheduler", interrupted)
        train(make_recipe(tmp_path), console)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    train(make_recipe(tmp_path), console)
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_a_crafted_base_with_another_method_is_refused(tmp_path: Path, console: Console) -> None:
    recipe = make_recipe(tmp_path)
    craft_checkpoint(tmp_path / "dense", tmp_path / "crafted", PESC)
    train(make_recipe(tmp_path, name=str(tmp_path / "crafted"), steps=2), console)
    other = PescConfig(num_experts=2, adapter_dim=8)
    with pytest.raises(ValueError, match="crafted already, with other settings"):
        train(make_recipe(tmp_path, name=str(tmp_path / "crafted"), pesc=other, folder=tmp_path / "new"), console)
    assert not (tmp_path / "new").exists()
    assert recipe.pesc == PESC


@pytest.mark.parametrize("file", ["trainer_state.json", "optimizer.pt", "rng_state.pth", "adapter/adapter.safetensors"])
@pytest.mark.parametrize("how", ["truncated", "absent", "other bytes"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, file: str, how: str
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 5)
        train(make_recipe(tmp_path), console)
    (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "notes.txt").write_text("the user's own")
    damaged = tmp_path / "run" / "checkpoints" / "checkpoint-4" / file
    content = damaged.read_bytes()
    damaged.unlink()
    if how != "absent":
        damaged.write_bytes(content[:-20] if how == "truncated" else content[:-20] + bytes(20))
    found = last_checkpoint(tmp_path / "run" / "checkpoints", console)
    assert found == tmp_path / "run" / "checkpoints" / "checkpoint-2"
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-4").exists()
    said = "".join(console.file.getvalue().split())  # a long path is cut into lines anywhere
    assert said.endswith(f"checkpoint-4:notasitwaswritten:{file}")


def test_the_newest_checkpoints_are_kept_when_the_clock_goes_backwards(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, now = PescTrainer._save_checkpoint, iter(range(2_000_000_000, 0, -1_000_000))

    def save(self: Any, *args: Any) -> None:
        plain(self, *args)
        stamp = next(now)
        os.utime(tmp_path / "run" / "checkpoints" / f"checkpoint-{self.state.global_step}", (stamp, stamp))

    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PescTrainer, "_save_checkpoint", save)
        interrupt_after(patch, 5)
        train(make_recipe(tmp_path, save_steps=1), console)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-5"}
    train(make_recipe(tmp_path), console)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] > 0


def test_a_complete_run_is_left_alone_and_another_recipe_refused(tmp_path: Path, console: Console) -> None:
    adapter = train(make_recipe(tmp_path), console)
    stamp = (adapter / "adapter.safetensors").stat().st_mtime_ns
    assert train(make_recipe(tmp_path), console) == adapter
    assert (adapter / "adapter.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"another recipe \(training.steps: 6 there, 7 asked for\)"):
        train(make_recipe(tmp_path, steps=7), console)


def test_a_run_goes_on_after_what_changes_no_result_and_after_a_new_setting(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(make_recipe(tmp_path), console)
    saved = tmp_path / "run" / "recipe.yaml"
    # As a version would have written it that did not know these settings.
    older = [
        line for line in saved.read_text().splitlines() if "lr_scheduler_type" not in line and "layers" not in line
    ]
    saved.write_text("\n".join(older))
    monkeypatch.chdir(tmp_path)
    train(make_recipe(tmp_path, name="dense", train=Path("rows.jsonl"), folder=Path("run"), save_steps=3), console)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("text", ["", "{", "- a", "model: m\nsteps: 3\n"])
def test_a_run_with_a_damaged_recipe_is_refused_with_a_way_out(tmp_path: Path, console: Console, text: str) -> None:
    recipe = make_recipe(tmp_path)
    recipe.output.folder.mkdir()
    (recipe.output.folder / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run is damaged, .* remove that folder, or choose another output.folder"):
        train(recipe, console)


def test_data_that_has_changed_since_are_refused(tmp_path: Path, console: Console) -> None:
    recipe = make_recipe(tmp_path)
    train(recipe, console)
    rows = tmp_path / "rows.jsonl"
    rows.rename(tmp_path / "elsewhere.jsonl")
    train(recipe, console)  # complete: needs no data
    write_rows(rows)
    train(recipe, console)
    with rows.open("a") as data:
        data.write(rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"the data have changed since the run in .*run began"):
        train(recipe, console)


def test_dense_and_crafted_runs_see_the_same_data_in_the_same_order(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list] = {}
    for name, pesc in (("dense", None), ("pesc", PESC)):
        batches: list = []
        plain = PescTrainer.training_step

        def step(self, model, inputs, *args, batches=batches, plain=plain):
            batches.append(inputs["input_ids"].tolist())
            return plain(self, model, inputs, *args)

        with monkeypatch.context() as patch:
            patch.setattr(PescTrainer, "training_step", step)
            train(make_recipe(tmp_path, folder=tmp_path / f"run-{name}", pesc=pesc), console)
        seen[name] = batches
    assert seen["dense"] == seen["pesc"]


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path: Path, console: Console) -> None:
    """The language model's part exactly; the balance loss is a mean over micro-batches, so its weight is 0 here.

    Four examples, so that a step holds all of them, whatever their order.
    """
    four = write_rows(tmp_path / "four.jsonl", 4)
    pesc = PescConfig(num_experts=4, adapter_dim=8, router_aux_loss_coef=0.0)
    runs = []
    for name, batch, accumulate in (("one", 4, 1), ("two", 2, 2)):
        recipe = make_recipe(
            tmp_path,
            folder=tmp_path / name,
            train=four,
            pesc=pesc,
            batch_size=batch,
            gradient_accumulation_steps=accumulate,
            steps=2,
        )
        runs.append(load_file(train(recipe, console) / "adapter.safetensors"))
    assert all(torch.allclose(runs[0][name], runs[1][name], atol=1e-4) for name in runs[0])


def documents(inputs: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Each document of a micro-batch alone, padded or packed."""
    input_ids, labels = inputs["input_ids"].tolist(), inputs["labels"].tolist()
    if "attention_mask" in inputs:
        parts = [(row, 0, length) for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist())]
    else:
        starts = [*(inputs["position_ids"][0] == 0).nonzero().flatten().tolist(), len(input_ids[0])]
        parts = [(0, start, end) for start, end in itertools.pairwise(starts)]
    return [(input_ids[row][start:end], labels[row][start:end]) for row, start, end in parts]


@pytest.mark.parametrize("packing", [None, "sdpa", "eager"])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU path", "GPU path"])
def test_gradients_are_those_of_the_definition(
    on_cpu: bool, packing: str | None, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    pesc = PescConfig(
        num_experts=[4, 3],
        num_experts_per_tok=[2, 1],
        adapter_dim=8,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.05,
    )
    packed = {"packing": packing is not None}
    recipe = make_recipe(tmp_path, pesc=pesc, gradient_accumulation_steps=2, steps=1, **packed)
    start, plain, step = training.build_model(recipe), PescTrainer.training_step, []
    found: dict[str, torch.Tensor] = {}

    def watched(self, model, inputs, *args):
        if packing:
            self.model.set_attn_implementation(packing)
        step.append(documents(inputs))
        loss = plain(self, model, inputs, *args)
        found.update(gradients(self.model))
        return loss

    monkeypatch.setattr(PescTrainer, "training_step", watched)
    monkeypatch.setattr(PescTrainer, "scores_labelled_positions", on_cpu)
    train(recipe, console)
    assert [len(micro_batch) for micro_batch in step] == ([6, 6] if packing else [2, 2])
    assert_same(found, step_gradients(start, step))


def test_a_failed_start_does_not_claim_the_folder(tmp_path: Path, console: Console) -> None:
    with pytest.raises(FileNotFoundError):
        train(make_recipe(tmp_path, train=tmp_path / "none.jsonl"), console)
    assert not (tmp_path / "run").exists()


def test_examples_that_do_not_fit_are_told(tmp_path: Path, console: Console) -> None:
    with pytest.raises(ValueError, match=r"no example with anything to train on within 16 tokens.*12 of 12"):
        train(make_recipe(tmp_path, max_length=16), console)
    train(make_recipe(tmp_path, max_length=40), console)
    assert re.search(r"rows.jsonl: \d+ examples are longer than data.max_length", console.file.getvalue())


def test_the_chat_template_goes_with_the_adapter_and_into_exports(tmp_path: Path, console: Console) -> None:
    train(make_recipe(tmp_path, chat_template="camelidae", steps=1), console)
    asked = [{"role": "user", "content": "hi"}]
    for place in (tmp_path / "run", export(tmp_path / "run", tmp_path / "standalone", "pesc")):
        tokenizer = load_tokenizer(place)
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert prompt == "### Human:\nhi\n### Assistant:\n"
