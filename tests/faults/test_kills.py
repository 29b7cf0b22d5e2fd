"""kill -9 at any moment: nothing incomplete looks complete, nothing complete is lost, the next run cleans up."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pesc.training.checkpoints import last_checkpoint
from verbs import Disturbance, Verb

pytestmark = pytest.mark.slow
Makers = dict[str, Callable[[str], Verb]]


def last_step(run: Path) -> int:
    """Of the newest checkpoint, after a look that each of them is intact."""
    console = Console(file=io.StringIO())
    last = last_checkpoint(run / "checkpoints", console)
    assert console.file.getvalue() == ""
    return int(last.name.split("-")[1]) if last else 0


@pytest.mark.parametrize("name", ["import", "craft", "export"])
def test_a_killed_writer_leaves_all_or_nothing_and_the_next_run_cleans_up(
    name: str, verbs: Makers, undisturbed: dict[str, Verb]
) -> None:
    twin = undisturbed[name]
    last = range(twin.accesses - 4, twin.accesses + 1)
    for at in {*random.Random(0).sample(range(1, twin.accesses), 6), *last}:
        verb = verbs[name](f"killed-{name}-{at}")
        assert verb.run(Disturbance(at)) == -9
        complete = verb.out.exists()
        code = verb.run()
        assert (code, verb.one_line()) == ((1, True) if complete else (0, False)), verb.errors
        assert verb.state() == twin.state()


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    verbs: Makers, undisturbed: dict[str, Verb]
) -> None:
    """Most accesses are those of checkpoints; the last ones are those of the end of the run."""
    twin, rng = undisturbed["train"], random.Random(0)
    moments = [[rng.randint(1, twin.accesses // 2) for _ in range(4)]]
    moments += [[twin.accesses - before] for before in (1, 5, 20)]
    for i, kills in enumerate(moments):
        verb, step = verbs["train"](f"killed-train-{i}"), 0
        for at in kills:
            assert verb.run(Disturbance(at)) == -9
            if verb.out.exists():
                break
            assert last_step(verb.out.parent) >= step
            step = last_step(verb.out.parent)
        assert verb.run() == 0, verb.errors
        assert verb.state() == twin.state()
