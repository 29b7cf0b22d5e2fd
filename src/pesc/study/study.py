"""A study: some arms, trained with some seeds, all measured on the same held-out examples.

Every run has a folder of its own and is trained and measured once; an interrupted study goes on from what is there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from pesc.crafting.cost import count_parameters
from pesc.crafting.load import ModelRef, locate
from pesc.crafting.lora import fold
from pesc.data.formats import read_examples
from pesc.evaluation.held_out import HeldOut, encode_held_out, score
from pesc.evaluation.samples import generate_answers
from pesc.machine.description import describe_machine
from pesc.machine.progress import Progress
from pesc.machine.quiet import quiet_libraries
from pesc.report.page import write_report
from pesc.report.results import (
    RESULTS,
    Arm,
    Parameters,
    Question,
    Results,
    Run,
    Source,
    Training,
    parse,
    to_json,
)
from pesc.storage.files import file_sha256, json_sha256, write_text
from pesc.storage.weights import weights_hash
from pesc.training.recipe import Recipe
from pesc.training.train import SUMMARY, train

SCORES = "scores.json"
Stage = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class StudyArm:
    """A model tuned in one way."""

    name: str
    recipe: Recipe | None = None
    """Its seed and folder are set by the study; None leaves the model as it is."""
    folder: str = ""
    """Of its runs, in the folder of each seed."""
    title: str = ""
    """What its runs are, for the one who waits for them."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms by seeds.

    The runs of the first seed lie in the study's folder, those of another seed in its `seed-N`.
    """

    folder: Path
    model: str
    """What every arm starts from: a folder, a hub id, or smollm2-135m-instruct."""
    arms: list[StudyArm]
    """The last one is compared with each of the others."""
    seeds: list[int]
    held_out: Path
    """JSONL, conversations with a `domain` each."""
    max_length: int = 2048
    questions_per_domain: int = 2
    answer_tokens: int = 128
    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    output: Path | None = None
    """Where results.json and the report are written; by default in `folder`."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds ({self.seeds}) must be at least one, and differ")

    def runs(self) -> Iterator[tuple[StudyArm, int | None]]:
        """Every run in order: models that are not trained, then each seed's."""
        yield from ((arm, None) for arm in self.arms if arm.recipe is None)
        yield from ((arm, seed) for seed in self.seeds for arm in self.arms if arm.recipe is not None)

    def folder_of(self, arm: StudyArm, seed: int | None) -> Path:
        """Where a run lies."""
        return (self.folder if seed in (None, self.seeds[0]) else self.folder / f"seed-{seed}") / arm.folder

    def recipe_of(self, arm: StudyArm, seed: int) -> Recipe:
        """What a run is trained by."""
        assert arm.recipe is not None
        training = dataclasses.replace(arm.recipe.training, seed=seed)
        output = dataclasses.replace(arm.recipe.output, folder=self.folder_of(arm, seed))
        return dataclasses.replace(arm.recipe, training=training, output=output)

    @cached_property
    def conversations(self) -> list[dict[str, Any]]:
        """The held-out conversations."""
        return read_examples(self.held_out)

    @cached_property
    def examples(self) -> HeldOut:
        """The held-out conversations as tokens."""
        return encode_held_out(self.conversations, locate(self.model).tokenizer(), self.max_length)

    @cached_property
    def questions(self) -> list[Question]:
        """The first held-out conversations of each domain."""
        found: dict[str, list[Question]] = {}
        for conversation in self.conversations:
            prompt = next(m["content"] for m in conversation["messages"] if m["role"] == "user")
            question = Question(conversation["domain"], prompt, conversation["messages"][-1]["content"])
            found.setdefault(question.domain, []).append(question)
        return [question for domain in found.values() for question in domain[: self.questions_per_domain]]


def run_study(study: Study, console: Console, stage: Stage) -> Results:
    """Train and measure what is missing; write results after each run, and the report after each seed.

    Args:
        study: the runs.
        console: where progress is shown.
        stage: entered with a title for each part of the work.

    Returns:
        The results, as results.json holds them.

    Raises:
        FileNotFoundError, ValueError: as `train` and `read_examples` do.
    """
    if study.examples.left_out:
        console.print(
            f"{study.examples.left_out} held-out examples are left out: truncated to {study.max_length} tokens, they"
            " keep nothing of their answers"
        )
    output = study.output or study.folder
    runs: dict[str, list[Run]] = {}
    for arm, seed in study.runs():
        with stage(arm.title + (f", seed {seed}" if seed is not None and len(study.seeds) > 1 else "")):
            if seed is not None:
                train(study.recipe_of(arm, seed), console, label=f"  {arm.name}")
            run = measure(study, arm, seed, console)
            folder = os.path.relpath(study.folder_of(arm, seed), output)
            runs.setdefault(arm.name, []).append(dataclasses.replace(run, folder=folder))
            results = _results(study, runs)
            write_text(output / RESULTS, to_json(results))
        if seed is not None and arm is study.arms[-1]:
            with stage("Report"):
                write_report(output)
    return results


def measure(study: Study, arm: StudyArm, seed: int | None, console: Console) -> Run:
    """Held-out loss, expert counts and answers of one run; from its scores.json if that was measured on the same."""
    folder = study.folder_of(arm, seed)
    ref, path, summary = locate(folder if arm.recipe else study.model), folder / SCORES, folder / SUMMARY
    key = _key(study, ref)
    if (there := _measured(path, console)) and there.key == key:
        return there
    with quiet_libraries():
        model = ref.load()
    parameters = Parameters(**dataclasses.asdict(count_parameters(model)))
    fold(model)
    with Progress(console, f"  {arm.name}: held-out loss", len(study.examples.examples)) as progress:
        nll, experts = score(model, study.examples, on_batch=progress.update)
    prompts = [question.prompt for question in study.questions]
    answers = generate_answers(model, ref.tokenizer(), prompts, max_new_tokens=study.answer_tokens) if prompts else []
    training = parse(Training, summary.read_bytes(), str(summary)) if arm.recipe else None
    run = Run(key, seed, ".", parameters, nll, answers, experts, training)
    write_text(path, to_json(run))
    return run


def _measured(path: Path, console: Console) -> Run | None:
    try:
        return parse(Run, path.read_bytes(), str(path)) if path.is_file() else None
    except ValueError as error:
        console.print(f"  {error}; measuring again", highlight=False, markup=False)
        return None


def _results(study: Study, runs: dict[str, list[Run]]) -> Results:
    """The results of the runs that are measured."""
    arms = [arm for arm in study.arms if arm.name in runs]
    return Results(
        model=study.model,
        arms=[Arm(arm.name, _settings(arm.recipe), runs[arm.name]) for arm in arms],
        examples=study.examples.examples,
        left_out=study.examples.left_out,
        questions=study.questions,
        sources=study.sources,
        notes=study.notes,
        machine=describe_machine(),
    )


def _key(study: Study, ref: ModelRef) -> str:
    """Of the model, the examples and what else decides a measurement."""
    files = sorted(ref.folder.glob("adapter.*")) if ref.kind == "adapter" else []
    digests = [file_sha256(file) for file in [study.held_out, *files]] + ([] if files else [weights_hash(ref.folder)])
    settings = [study.max_length, study.questions_per_domain, study.answer_tokens]
    return json_sha256([digests, settings])


def _settings(recipe: Recipe | None) -> dict[str, str]:
    """A recipe with dotted names, without what differs from run to run and without places on this machine."""
    if recipe is None:
        return {}
    left_out = ("output.", "data.train", "data.eval", "model.name", "training.seed")
    return {key: value for key, value in _flat("", recipe.to_dict()) if not key.startswith(left_out)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}".lstrip("."), inner)
    elif value is not None:
        yield name, str(value)
