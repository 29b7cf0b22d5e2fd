"""What the verbs make of a folder, within limits, and whether that is allowed.

Allowed: refused in a line that names what is wrong; or right. An accepted model is right if it computes what the
undamaged one does, and wrong if not, unless only hashes could tell and the folder has none.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fuzz import documents, structure, values  # noqa: F401 (they fill the families)
from fuzz.damage import FAMILIES
from fuzz.folders import KINDS, Folders
from fuzz.verbs import VERBS

SECONDS, BYTES = 10, 2 * 1024**3
"""What a verb may take, in seconds of processor time and bytes above those of the undamaged folder."""
SUMS = "SHA256SUMS"
RARE = {"train": 8, "chat": 2}
"""One of so many cases goes through these verbs."""

_HIDDEN = ("json_value", "json_key_lost", "json_key_added", "json_syntax", "second_weights", "gguf_header", "gguf_name")
"""Structural damages that may leave a sound folder of another model."""
REFUSED = {(kind, verb) for kind in ("camelidae", "camelidae-bin", "sparsetral", "gguf") for verb in ("load", "info")}
"""What is refused of an undamaged folder too."""


@dataclass(frozen=True)
class Case:
    """One damaged folder, the same each time it is made."""

    kind: str
    family: str
    damage: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.family}/{self.damage}/{self.seed}"

    def make(self, folders: Folders) -> tuple[str | None, bool]:
        """Make the folder.

        Returns:
            What was damaged, or None if the damage does not apply; and whether it can be told: by names, shapes and
            types, or else by hashes.
        """
        rng, place = random.Random(str(self)), folders.fresh(self.kind)
        names = ("config.json", "adapter.json", "recipe.yaml")
        targets = sorted({file.parent for name in names for file in place.rglob(name)}) or [place]
        folder = rng.choice(targets)
        if bare := rng.random() < 0.5:
            for sums in place.rglob(SUMS):
                sums.unlink()
        said = FAMILIES[self.family][self.damage](folder, rng)
        hashed = KINDS[self.kind].hashed and (folder.name == "base" or not bare)
        where = f"{folder.relative_to(place)}{'' if hashed else ', no hashes'}"
        return said and f"{where}: {said}", hashed or (self.family == "structure" and self.damage not in _HIDDEN)


@dataclass
class Outcome:
    """What a verb did."""

    status: str = "killed"
    """"accepted", "refused", "crashed", "slow", "large", or "killed" by the machine."""
    message: str = ""
    logits: list[float] = field(default_factory=list)


def cases(number: int, seed: int, kinds: list[str]) -> list[Case]:
    """Cases of all kinds in turn, each with a damage drawn at random."""
    rng = random.Random(seed)
    damages = [(family, name) for family, named in FAMILIES.items() for name in named]
    # These have many more ways than others.
    damages += [("settings", "another_setting"), ("structure", "json_value"), ("values", "bit_flipped")] * 3
    return [Case(kinds[i % len(kinds)], *rng.choice(damages), seed * 1_000_000 + i) for i in range(number)]


def run(kind: str, folders: Folders, verbs: list[str]) -> dict[str, Outcome]:
    """Run verbs on the folder of a kind, in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            with os.fdopen(writer, "w") as stream:
                _run_all(kind, folders.work / kind, verbs, stream)
        finally:
            os._exit(0)
    os.close(writer)
    outcomes: dict[str, Outcome] = {}
    with os.fdopen(reader) as stream:
        for line in stream:
            verb, values = json.loads(line)
            outcomes[verb] = Outcome(**values)
    _, status = os.waitpid(child, 0)
    done = len(outcomes)
    if done < len(verbs):
        outcomes[verbs[done]] = Outcome("killed", f"by signal {status & 127}")
    return outcomes


def _run_all(kind: str, place: Path, verbs: list[str], stream: Any) -> None:
    devnull = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(devnull, number)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS * len(verbs), SECONDS * len(verbs) + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _too_long)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    for verb in verbs:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        outcome = _outcome(lambda verb=verb: VERBS[verb](place, place / KINDS[kind].model))
        signal.setitimer(signal.ITIMER_PROF, 0)
        stream.write(json.dumps([verb, asdict(outcome)]) + "\n")
        stream.flush()


def _outcome(act: Callable[[], list[float]]) -> Outcome:
    try:
        return Outcome("accepted", logits=act())
    except _TooLongError:
        return Outcome("slow", f"more than {SECONDS} s")
    except MemoryError:
        return Outcome("large", "MemoryError")
    except (ValueError, OSError) as error:
        large = any(word in str(error) for word in ("allocate memory", "not enough memory", "Cannot allocate"))
        return Outcome("large" if large else "refused", str(error))
    except BaseException as error:
        large = any(word in str(error) for word in ("allocate memory", "not enough memory", "Cannot allocate"))
        frame = traceback.extract_tb(error.__traceback__)
        where = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frame) if "/pesc/" in f.filename), "")
        return Outcome("large" if large else "crashed", f"{type(error).__name__} at {where}: {str(error)[:200]}")


class _TooLongError(BaseException):
    pass


def _too_long(*_: object) -> None:
    raise _TooLongError


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) * 1024


def faults(outcomes: dict[str, Outcome], sound: dict[str, Outcome], place: Path, *, told: bool) -> dict[str, str]:
    """What is wrong with each verb's outcome, by verb.

    Args:
        outcomes: of the damaged folder.
        sound: of the undamaged one.
        place: of the folder; refusals must name it, or a file or folder in it.
        told: whether the damage can be told.
    """
    caught = outcomes["verify"].status == "refused"
    found = {}
    for verb, outcome in outcomes.items():
        if outcome.status == "refused":
            found[verb] = "" if verb == "verify" else _unclear(outcome.message, place)
        elif outcome.status == "accepted":
            found[verb] = _accepted_wrongly(outcome.logits, sound[verb], told=told, caught=caught)
        else:
            found[verb] = f"{outcome.status}: {outcome.message}"
    loadable = outcomes.get("load", sound["load"]).status == sound["load"].status
    if outcomes["verify"].status == "accepted" and not loadable:
        found["verify"] = f"complete, but load says: {outcomes['load'].message}"
    return {verb: fault for verb, fault in found.items() if fault}


def _unclear(message: str, place: Path) -> str:
    first, *more = message.splitlines() or [""]
    if any(not line.startswith("  ") for line in more):
        return f"more than one line: {message[:300]!r}"
    return "" if str(place) in first else f"no file or folder is named: {first[:200]}"


def _accepted_wrongly(logits: list[float], sound: Outcome, *, told: bool, caught: bool) -> str:
    if not logits or _same(logits, sound.logits):
        return ""
    if sound.status != "accepted":
        return f"accepted, but undamaged it is refused: {sound.message[:200]}"
    if told:
        return "accepted as another model"
    if not all(map(math.isfinite, logits)) and not caught:
        return "accepted, and computes NaN, and verify says complete"
    return ""


def _same(logits: list[float], sound: list[float]) -> bool:
    return len(logits) == len(sound) and torch.allclose(torch.tensor(logits), torch.tensor(sound), atol=1e-4, rtol=1e-4)


def fuzz(chosen: list[Case], folders: Folders, *, show: bool = False) -> dict[tuple[str, str], list[str]]:
    """Run cases.

    Returns:
        By (family, verb), an entry for each case that went through: what was wrong, or an empty text.
    """
    sound = {kind: run(kind, folders, list(KINDS[kind].verbs)) for kind in {case.kind for case in chosen}}
    for kind, outcomes in sound.items():
        for verb, outcome in outcomes.items():
            wanted = "refused" if (kind, verb) in REFUSED else "accepted"
            assert outcome.status == wanted, f"{kind}: {verb}: {outcome}"
    table: dict[tuple[str, str], list[str]] = {}
    for number, case in enumerate(chosen):
        said, told = case.make(folders)
        if said is None:
            continue
        verbs = [verb for verb in KINDS[case.kind].verbs if case.seed % RARE.get(verb, 1) == 0]
        outcomes = run(case.kind, folders, verbs)
        wrong = faults(outcomes, sound[case.kind], folders.work / case.kind, told=told)
        for verb in outcomes:
            table.setdefault((case.family, verb), []).append(wrong.get(verb, "") and f"{case}: {verb}: {wrong[verb]}")
        if show:
            for verb, fault in wrong.items():
                print(f"{case}  {said}\n    {verb}: {fault}", flush=True)
            if number % 100 == 99:
                print(f"... {number + 1} cases", file=sys.stderr, flush=True)
    return table
