"""A disk that is full, read-only or gone: one line, nothing incomplete, and the same command works once it is well."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from verbs import Disturbance, Verb

pytestmark = pytest.mark.slow
Makers = dict[str, Callable[[str], Verb]]
VERBS = ["import", "craft", "export", "train"]


@pytest.mark.parametrize("name", VERBS)
def test_a_file_that_cannot_grow_gives_one_line_and_leaves_nothing_incomplete(
    name: str, verbs: Makers, undisturbed: dict[str, Verb]
) -> None:
    """A limit on the size of files fails writes at the same places as a full disk, without rights to mount one."""
    twin, verb = undisturbed[name], verbs[name](f"full-{name}")
    refused = 0
    for size in (4000, 8000, 16_000, 32_000):
        if verb.run(Disturbance(file_size=size)) == 0:
            break
        refused += 1
        assert verb.one_line() and "File too large" in verb.errors
        assert not verb.out.exists()
        assert not [path for path in verb.state() if "partial" in path or path.endswith(".lock")]
    assert refused >= 2
    assert verb.out.exists() or verb.run() == 0, verb.errors
    assert verb.state() == twin.state()


@pytest.mark.parametrize("name", VERBS)
def test_a_read_only_folder_gives_one_line(name: str, verbs: Makers) -> None:
    verb = verbs[name](f"read-only-{name}")
    verb.folder.chmod(0o555)
    assert verb.run(Disturbance(obey_modes=True)) == 1
    assert verb.one_line() and "Permission denied" in verb.errors


@pytest.mark.parametrize("name", VERBS)
def test_a_folder_that_vanishes_gives_one_line(name: str, verbs: Makers, undisturbed: dict[str, Verb]) -> None:
    twin = undisturbed[name]
    for at in random.Random(1).sample(range(1, twin.accesses - 8), 4):
        verb = verbs[name](f"vanished-{name}-{at}")
        code = verb.run(Disturbance(at, "vanish"))
        assert (code == 1 and verb.one_line()) or verb.state() == twin.state(), verb.errors
