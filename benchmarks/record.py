"""The run of record: the paper's settings scaled down, killed three times, against a twin that nobody disturbed.

SmolLM2-135M in float32, and in NF4 with bfloat16 compute; LoRA on all linear layers, 8 experts, top 2, dropout, a
constant rate after a warm-up, clipping at 0.3, paged AdamW; a mixture of three sources in three formats, packed. A run
is killed with SIGKILL at three random moments after a step, and started again by the same command.
Run: python benchmarks/record.py [--steps 24] [--folder runs/record]; some 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from pesc.demo.mixture import build_mixture

KILLS, ROWS = 3, 200
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "NF4": {"dtype": "bfloat16", "quantization": "nf4"},
}


def write_sources(folder: Path) -> list[dict[str, Any]]:
    """Chat as ShareGPT in JSONL, code as Alpaca in one JSON array, math as messages in JSONL, with weights."""
    rows = [json.loads(line) for line in build_mixture(folder, ROWS, 10, 0).train.read_text().splitlines()]
    texts = {
        domain: [[turn["content"] for turn in row["messages"]] for row in rows if row["domain"] == domain]
        for domain in ("chat", "code", "math")
    }
    chat = [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in texts["chat"]]
    code = [{"instruction": ask, "output": answer} for ask, answer in texts["code"]]
    math = [row for row in rows if row["domain"] == "math"]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    (folder / "code.json").write_text(json.dumps(code))
    (folder / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in math))
    weights = {"chat.jsonl": 3, "code.json": 1, "math.jsonl": 1}  # as IDAE-500K
    return [{"path": str(folder / name), "weight": weight} for name, weight in weights.items()]


def write_recipe(sources: list[dict[str, Any]], model: dict[str, Any], steps: int, run: Path) -> Path:
    """The paper's settings, but for the adapters' width, the batch and the lengths."""
    recipe = {
        "model": {"name": "smollm2-135m-instruct", **model},
        "pesc": {"num_experts": 8, "num_experts_per_tok": 2, "adapter_dim": 64, "adapter_dropout": 0.1},
        "lora": {"r": 64, "alpha": 16, "dropout": 0.05},
        "data": {"train": sources, "max_length": 256, "packing": True},
        "training": {
            "steps": steps,
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "optim": "paged_adamw_32bit",
            "gradient_checkpointing": True,
        },
        "output": {"folder": str(run), "save_steps": max(1, steps // 8)},
    }
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    return file


def trained(recipe: Path, run: Path, kills: int, rng: random.Random) -> float:
    """Run to the end; after each of so many kills, again. Seconds of the undisturbed last part."""
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-m", "pesc", "train", str(recipe)])
        before = steps_done(run)
        while process.poll() is None and steps_done(run) <= before:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 40))
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed after step {steps_done(run)}", flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pesc", "train", str(recipe)], check=True)
    return time.perf_counter() - start


def steps_done(run: Path) -> int:
    """Lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def what_counts(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The adapter's tensors, and every step's numbers but its times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [
        {key: value for key, value in line.items() if key not in ("elapsed", "tokens_per_second")} for line in lines
    ]
    return load_file(run / "adapter" / "adapter.safetensors"), timeless


def main() -> int:
    """Print a table; the exit code is 1 if a killed run differs from its twin."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=Path("runs/record"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    sources, rng, rows, wrong = write_sources(options.folder.resolve()), random.Random(0), [], 0
    for name, model in PRECISIONS.items():
        runs = {kind: options.folder / f"{name.lower()}-{kind}" for kind in ("twin", "killed")}
        for kind, run in runs.items():
            trained(write_recipe(sources, model, options.steps, run), run, KILLS * (kind == "killed"), rng)
        (twin, twin_lines), (killed, lines) = map(what_counts, runs.values())
        same = twin.keys() == killed.keys() and all(torch.equal(twin[key], killed[key]) for key in twin)
        wrong += not (same and lines == twin_lines)
        losses = [line["loss"] for line in twin_lines]
        ends = f"{sum(losses[:5]) / 5:.3f} to {sum(losses[-5:]) / 5:.3f}"
        peak = json.loads((runs["twin"] / "summary.json").read_text())["peak_memory_gb"]
        equal = f"{'equal' if lines == twin_lines else 'DIFFERENT'}, {'equal' if same else 'DIFFERENT'}"
        rows.append(f"| {name} | {ends} | {peak:.2f} | {equal} |")
    print(
        f"\n{options.steps} steps, {KILLS} kills\n\n| base | loss, mean of 5 steps | peak memory, GB | steps, weights |"
    )
    print("|---|---|---|---|\n" + "\n".join(rows))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
