"""kill -9 at any moment: nothing incomplete looks complete, nothing complete is lost, the next run cleans up."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from faults.verbs import STEPS, Disturbance, Verb, make_verbs
from pesc.training.checkpoints import last_checkpoint

FIXTURE = Path(__file__).parents[1] / "fixtures" / "camelidae-8x"
Makers = dict[str, Callable[[str], Verb]]


@pytest.fixture(scope="module")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Makers:
    return make_verbs(tmp_path_factory.mktemp("faults"), FIXTURE)


@pytest.fixture(scope="module")
def undisturbed(verbs: Makers) -> dict[str, Verb]:
    found = {name: make(f"undisturbed-{name}") for name, make in verbs.items()}
    for verb in found.values():
        assert verb.run() == 0, verb.errors
    return found


def last_step(run: Path) -> int:
    """Of the newest checkpoint, after a look that each of them is intact."""
    console = Console(file=io.StringIO())
    last = last_checkpoint(run / "checkpoints", console)
    assert console.file.getvalue() == ""
    return int(last.name.split("-")[1]) if last else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["import", "craft", "export"])
def test_a_killed_writer_leaves_all_or_nothing_and_the_next_run_cleans_up(
    name: str, verbs: Makers, undisturbed: dict[str, Verb]
) -> None:
    twin = undisturbed[name]
    for at in range(1, twin.accesses + 1):
        verb = verbs[name](f"killed-{name}-{at}")
        assert verb.run(Disturbance(at)) == -9
        complete = verb.out.exists()
        code = verb.run()
        assert (code, verb.one_line()) == ((1, True) if complete else (0, False)), verb.errors
        assert verb.state() == twin.state()


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    verbs: Makers, undisturbed: dict[str, Verb]
) -> None:
    """Most accesses are those of checkpoints; the last ones are those of the end of the run."""
    twin, rng = undisturbed["train"], random.Random(0)
    moments = [[rng.randint(1, twin.accesses) for _ in range(4)] for _ in range(2)]
    moments += [[twin.accesses - before] for before in (0, 1, 3, 8, 16)]
    for i, kills in enumerate(moments):
        verb, step = verbs["train"](f"killed-train-{i}"), 0
        for at in kills:
            killed = verb.run(Disturbance(at)) == -9
            if verb.out.exists():
                break
            assert killed and step <= last_step(verb.out.parent) <= STEPS
            step = last_step(verb.out.parent)
        assert verb.run() == 0, verb.errors
        assert verb.state() == twin.state()
