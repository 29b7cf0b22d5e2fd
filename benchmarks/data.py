"""Data at the paper's size: how fast a mixture is prepared, in how much memory, and how soon a second start trains.

Writes a synthetic mixture of three sources in three formats (conversations of some 500 tokens, made of the words of the
standard library), prepares it with the embedded model's tokenizer, then prepares it again from what is on disk.
Run: python benchmarks/data.py [--rows 500000] [--folder runs/data]; some 10 minutes on two cores, 5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

WORDS_OF_ANSWER = 280


def conversations(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions and answers of random length."""
    draw = random.Random(seed)
    words = [word for file in Path(os.__file__).parent.glob("a*.py") for word in file.read_text().split()]
    for _ in range(count):
        start, length = draw.randrange(len(words) - 1000), max(5, round(draw.gauss(WORDS_OF_ANSWER, 120)))
        yield " ".join(words[start : start + 20]), " ".join(words[start + 20 : start + 20 + min(length, 900)])


def write_sources(folder: Path, rows: int) -> list[dict[str, Any]]:
    """ShareGPT as JSONL, question and answer as Parquet, Alpaca as a JSON array: 60, 20 and 20 % of the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sharegpt.jsonl").open("w") as stream:
        for ask, say in conversations(rows * 6 // 10, 0):
            turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": say}]
            stream.write(json.dumps({"conversations": turns}) + "\n")
    schema = pa.schema({"problem": pa.string(), "solution": pa.string()})
    with pq.ParquetWriter(folder / "pairs.parquet", schema) as writer:
        for part in range(20):
            pairs = [{"problem": ask, "solution": say} for ask, say in conversations(rows // 100, part + 1)]
            writer.write_table(pa.Table.from_pylist(pairs, schema))
    with (folder / "alpaca.json").open("w") as stream:
        lines = ({"instruction": ask, "output": say} for ask, say in conversations(rows * 2 // 10, 99))
        stream.write("[" + ",\n".join(map(json.dumps, lines)) + "]")
    return [{"path": str(folder / name)} for name in ("sharegpt.jsonl", "pairs.parquet", "alpaca.json")]


def start(recipe: Path) -> tuple[float, float]:
    """Seconds of `pesc data`, and the largest memory of all its processes together, in GB without shared pages."""
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "pesc", "data", str(recipe)])
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        used = 0
        for each in [watched, *watched.children(recursive=True)]:
            try:
                used += each.memory_full_info().uss
            except psutil.Error:
                continue
        peak = max(peak, used)
        time.sleep(0.5)
    assert process.returncode == 0
    return time.perf_counter() - begin, peak / 1e9


def main() -> None:
    """Write, prepare, prepare again; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/data"))
    arguments = parser.parse_args()
    os.environ["PESC_CACHE"] = str(cache := (arguments.folder / "cache").resolve())
    sources = write_sources(arguments.folder / "sources", arguments.rows)
    recipe = arguments.folder / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"name": "smollm2-135m-instruct"},
                "data": {"train": sources},
                "output": {"folder": str(arguments.folder / "run")},
            }
        )
    )
    subprocess.run([sys.executable, "-m", "pesc", "info", "smollm2-135m-instruct"], check=True)
    shutil.rmtree(cache / "data", ignore_errors=True)
    (first, first_peak), (second, second_peak) = start(recipe), start(recipe)
    size = sum(file.stat().st_size for file in (cache / "data").rglob("*.arrow")) / 1e9
    print("| rows | first start | rows/s | peak memory | on disk | second start | peak memory |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.rows:,} | {first:.0f} s | {arguments.rows / first:.0f} | {first_peak:.2f} GB | {size:.1f} GB "
        f"| {second:.0f} s | {second_peak:.2f} GB |"
    )


if __name__ == "__main__":
    main()
