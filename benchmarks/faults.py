"""Faults: `kill -9` at random moments, and ever smaller disks, in `pesc import`, `craft`, `export` and `train`.

A killed verb is run again. A trained run is killed and resumed until it is complete, and must then equal a twin that
nobody disturbed. The disks are tmpfs; without the right to mount one they are left out.

Run: python benchmarks/faults.py [KILLS] [SEED]; by default 30 kills a verb, seed 0; some ten minutes on two cores.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
os.environ["HF_HUB_OFFLINE"] = "1"

from verbs import Verb, make_verbs  # noqa: E402 (the tests' helpers are no package)

Make = Callable[[str], Verb]
DISKS, WRONG = 10, "WRONG"


def main(kills: int = 30, seed: int = 0) -> int:
    """Print a table; the exit code is 1 if anything went wrong."""
    rng, wrong = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        verbs = make_verbs(Path(folder), TESTS / "fixtures" / "camelidae-8x")
        print(f"\n{kills} kills a verb, seed {seed}\n\n| verb | disturbed | what was seen |\n|---|---|---|")
        for name, make in verbs.items():
            twin = make(f"twin-{name}")
            assert twin.run() == 0, twin.errors
            twin, start = make(f"timed-{name}"), time.perf_counter()  # warm now
            assert twin.run() == 0, twin.errors
            seconds = time.perf_counter() - start
            moments = [rng.uniform(0, seconds) for _ in range(kills)]
            for disturbed, seen in (
                (f"{kills} x kill -9", killed(make, twin, moments)),
                (f"{DISKS} disks", on_small_disks(make, twin)),
            ):
                print(f"| {name} | {disturbed} | {', '.join(f'{count} {what}' for what, count in seen.items())} |")
                wrong += seen[WRONG]
    return int(wrong > 0)


def killed(make: Make, twin: Verb, moments: list[float]) -> Counter[str]:
    """Kill runs at moments; run each again to its end, except a trained run, which is killed until it is complete."""
    seen: Counter[str] = Counter()
    verb = None
    for i, moment in enumerate(moments):
        if verb is None:
            verb = make(f"killed-{twin.name}-{i}")
        process = verb.start()
        process.join(moment)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            seen["ended before the kill"] += 1
        elif verb.out.exists():
            seen["complete when killed"] += 1
        else:
            seen["not complete when killed"] += 1
            if verb.name == "train" and i + 1 < len(moments):
                continue
        seen[next_run(verb, twin)] += 1
        verb = None
    return seen


def next_run(verb: Verb, twin: Verb) -> str:
    """What the next run does, which must leave what an undisturbed one leaves, and nothing else."""
    complete = verb.out.exists()
    code = verb.run()
    expected = 1 if complete and verb.name != "train" else 0
    if code == expected and "Traceback" not in verb.errors and verb.state() == twin.state():
        return "then left alone" if complete else "then finished, equal to the twin"
    print(f"{WRONG}: {verb.name} in {verb.folder}: exit {code}, {verb.errors}", file=sys.stderr)
    return WRONG


def on_small_disks(make: Make, twin: Verb) -> Counter[str]:
    """Run on disks of 16 KiB to 1 MiB; then, where that failed, on the same disk made larger."""
    seen: Counter[str] = Counter()
    for i in range(DISKS):
        verb = make(f"disk-{twin.name}-{i}")
        size = 4096 * round(4 * 1.6**i)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", verb.folder]).returncode:
            return Counter({"not tried, for want of the right to mount": 1})
        try:
            code = verb.run()
            if code == 0:
                seen["large enough"] += 1
            elif code == 1 and verb.one_line() and not verb.out.exists():
                seen["one line, nothing incomplete"] += 1
                subprocess.run(["mount", "-o", "remount,size=1g", verb.folder], check=True)
                seen[next_run(verb, twin)] += 1
            else:
                seen[WRONG] += 1
                print(f"{WRONG}: {verb.name} on {size} bytes: exit {code}, {verb.errors}", file=sys.stderr)
        finally:
            subprocess.run(["umount", verb.folder], check=True)
    return seen


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
