"""How long crafting a large checkpoint on disk takes, and how much memory: against reading the checkpoint once.

Writes a synthetic sharded checkpoint of Llama-2-7B's shape with fewer layers, then crafts it. The peak memory is of
the crafting process alone. Run: python benchmarks/craft_checkpoint.py [--layers 10] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

CHILD = """
import json, sys, time
start = time.perf_counter()
from pesc import PescConfig, craft_checkpoint
imported = time.perf_counter()
from pathlib import Path
craft_checkpoint(sys.argv[1], Path(sys.argv[2]), PescConfig())
done = time.perf_counter()
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1e6
print(json.dumps({"import_s": imported - start, "craft_s": done - imported, "peak_gb": peak}))
"""


def write_dense(folder: Path, layers: int) -> int:
    """Random bf16 weights, one shard a layer; returns the bytes written."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, dtype="bfloat16"
    )
    with torch.device("meta"):
        names = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, shape in names.items():
        group = name.split(".")[2] if ".layers." in name else "rest"
        groups.setdefault(group, {})[name] = shape
    weight_map, total = {}, 0
    for i, group in enumerate(groups.values(), start=1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in group.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
        total += (folder / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return total


def read_all(folder: Path) -> float:
    """Seconds to read every weight file once."""
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        (folder / "dense").mkdir()
        total = write_dense(folder / "dense", arguments.layers)
        print(f"dense checkpoint: {total / 1e9:.2f} GB in {arguments.layers + 1} shards")
        for run in range(arguments.runs):
            reading = read_all(folder / "dense")
            command = [sys.executable, "-c", CHILD, str(folder / "dense"), str(folder / f"crafted-{run}")]
            figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            new = (folder / f"crafted-{run}" / "model-experts.safetensors").stat().st_size
            print(
                f"run {run}: craft {figures['craft_s']:.1f} s (after {figures['import_s']:.1f} s of imports), "
                f"{figures['craft_s'] / reading:.2f} x the time to read the dense files once ({reading:.1f} s); "
                f"peak memory {figures['peak_gb']:.2f} GB; new weights {new / 1e9:.2f} GB"
            )


if __name__ == "__main__":
    main()
