"""The long form: `python -m tests.fuzz --cases 1000 --seed 0`; one case again: `--case ID`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fuzz.folders import KINDS, Folders
from fuzz.outcomes import Case, cases, fuzz


def main() -> int:
    """Run the cases, print what is wrong, and a table of families and verbs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--case", nargs="+", help="kind/family/damage/seed of cases to run again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        parts = [text.split("/") for text in options.case]
        chosen = [Case(kind, family, damage, int(seed)) for kind, family, damage, seed in parts]
    else:
        chosen = cases(options.cases, options.seed, options.kinds)
    with tempfile.TemporaryDirectory() as root:
        table = fuzz(chosen, Folders(Path(root), sorted({case.kind for case in chosen})), show=True)
    verbs = list(dict.fromkeys(verb for _, verb in table))
    print("| damage | " + " | ".join(verbs) + " |\n|---|" + "---|" * len(verbs))
    for family in dict.fromkeys(family for family, _ in table):
        cells = [table.get((family, verb), []) for verb in verbs]
        print(f"| {family} | " + " | ".join(f"{sum(map(bool, cell))} of {len(cell)}" for cell in cells) + " |")
    return int(any(any(cell) for cell in table.values()))


if __name__ == "__main__":
    sys.exit(main())
