"""What the tests of faults share: verbs to disturb, and an undisturbed run of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from verbs import Verb, make_verbs

FIXTURE = Path(__file__).parents[1] / "fixtures" / "camelidae-8x"
Makers = dict[str, Callable[[str], Verb]]


@pytest.fixture(scope="session")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Makers:
    return make_verbs(tmp_path_factory.mktemp("faults"), FIXTURE)


@pytest.fixture(scope="session")
def undisturbed(verbs: Makers) -> dict[str, Verb]:
    found = {name: make(f"undisturbed-{name}") for name, make in verbs.items()}
    for verb in found.values():
        assert verb.run() == 0, verb.errors
    return found
