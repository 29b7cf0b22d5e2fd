"""How the cost of experts grows with tokens, experts, chosen experts, adapter dim and layers, against the laws for it.

A random Llama of SmolLM2's width, fp32, is trained for a step with LoRA and with experts besides, in turns. Drawn is
what the experts add: time relative to dense + LoRA, and peak memory in MB. The laws: time as the multiplications;
memory as the experts' weights and moments, and the larger of their gradients and what the forward pass keeps, the
adapters' input and first products of every token and layer. AdamW's own time is in neither law.
Run: python benchmarks/scaling.py [--plot] [--date 2026-11-24]; with --plot it only draws what was measured, to
docs/scaling.png: dots are measured, lines the laws. Some 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import altair as alt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pesc.bench.config import BenchConfig
from pesc.bench.model_pair import DENSE, bound, build_model_pair
from pesc.bench.peak import peak_memory
from pesc.bench.steps import make_steps
from pesc.bench.timing import interleave
from pesc.config import PescConfig
from pesc.machine.allocator import keep_freed_memory
from pesc.machine.description import describe_machine
from pesc.report import charts

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parents[1] / "docs" / "scaling.png"
HIDDEN, FLOAT = 576, 4
ROUNDS = 5


@dataclass(frozen=True)
class Point:
    """One shape."""

    tokens: int = 1024
    experts: int = 8
    chosen: int = 2
    adapter_dim: int = 64
    layers: int = 4


SWEEPS = {
    "tokens": [32, 64, 128, 256, 512, 1024, 2048, 4096],
    "experts": [2, 4, 8, 16, 32, 64],
    "chosen": [1, 2, 3, 4, 6, 8],
    "adapter_dim": [16, 32, 64, 128, 256, 512, 1024],
    "layers": [1, 2, 4, 8, 16],
}
LABELS = {
    "tokens": "tokens T",
    "experts": "experts E",
    "chosen": "chosen experts K",
    "adapter_dim": "adapter dim A",
    "layers": "layers",
}


def measure(point: Point) -> dict[str, Any]:
    """What experts add at one shape, and what the laws say."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=point.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    torch.manual_seed(0)
    pesc_config = PescConfig(num_experts=point.experts, num_experts_per_tok=point.chosen, adapter_dim=point.adapter_dim)
    pair = build_model_pair(LlamaForCausalLM(config), pesc_config, lora=True)
    rows = max(1, point.tokens // 512)
    bench = BenchConfig(tokens=point.tokens // rows)
    steps = {
        variant: step for variant, step in make_steps(pair, "train", rows, bench).items() if variant in (DENSE, "auto")
    }
    timings = interleave({name: step.run for name, step in steps.items()}, ROUNDS)
    ratio, low, high = timings["auto"].ratio(timings[DENSE])
    memory = {name: peak_memory(step.run, step.resident()) for name, step in steps.items()}
    kept = point.layers * point.tokens * (HIDDEN + point.chosen * point.adapter_dim) * FLOAT
    own = steps["auto"].own_memory()  # a quarter each: weights, gradients, two moments
    return {
        "point": asdict(point),
        "time": [100 * (r - 1) for r in (ratio, low, high)],
        "time_law": 100 * (bound(pair, "auto", "train") - 1),
        "memory": (memory["auto"] - memory[DENSE]) / 1e6,
        "memory_law": (own * 3 / 4 + max(kept, own / 4)) / 1e6,
    }


def run(path: Path) -> None:
    """Measure every sweep that the file does not hold yet."""
    found: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"machine": describe_machine(), "sweeps": {}}
    )
    for name, values in SWEEPS.items():
        if name in found["sweeps"]:
            continue
        points = []
        for value in values:
            points.append(measure(replace(Point(), **{name: value})))
            gc.collect()
            print(name, value, points[-1], flush=True)
        found["sweeps"][name] = points
        path.write_text(json.dumps(found, indent=1) + "\n")


QUANTITIES = {"time": "added time, % of dense + LoRA", "memory": "added peak memory, MB"}
SPANS = {"time": [1, 100], "memory": [10, 1000]}


def draw(path: Path) -> None:
    """A small plot for each variable: measured points, those of time with quartiles, and the law as a line."""
    sweeps = json.loads(path.read_text())["sweeps"]
    rows = [
        alt.hconcat(*(_panel(name, points, quantity, first=i == 0) for i, (name, points) in enumerate(sweeps.items())))
        for quantity in QUANTITIES
    ]
    PLOT.write_bytes(charts.picture(charts.spec_of(alt.vconcat(*rows)), scale=1))


def _panel(name: str, points: list[dict[str, Any]], quantity: str, first: bool) -> alt.LayerChart:
    rows = []
    for point in points:
        middle, low, high = point[quantity] if quantity == "time" else [point[quantity]] * 3
        law = point[f"{quantity}_law"]
        rows.append({"at": point["point"][name], "measured": middle, "low": low, "high": high, "law": law})
    across = alt.X("at:Q", title=LABELS[name] if quantity == "memory" else None)
    across = across.scale(type="log", base=2).axis(
        values=[row["at"] for row in rows], format="d", labelFontSize=10, labelAngle=0
    )
    base = alt.Chart(alt.Data(values=rows)).encode(x=across)

    def up(field: str) -> alt.Y:
        low, high = SPANS[quantity]
        axis = alt.Axis(values=[value for value in (1, 3, 10, 30, 100, 300, 1000) if low <= value <= high])
        return alt.Y(field, type="quantitative", title=QUANTITIES[quantity] if first else None, axis=axis).scale(
            type="log", domain=SPANS[quantity], clamp=True
        )

    law = base.mark_line(strokeWidth=2, color=alt.ExprRef("muted")).encode(y=up("law"))
    reach = base.mark_rule(strokeWidth=2, color=alt.ExprRef("first")).encode(y=up("low"), y2="high:Q")
    dots = base.mark_point(filled=True, size=45, opacity=1, color=alt.ExprRef("first")).encode(y=up("measured"))
    return alt.layer(law, reach, dots).properties(width=170, height=150)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--date", default=date.today().isoformat())
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.date}-scaling.json"
    if not arguments.plot:
        keep_freed_memory()
        run(path)
    draw(path)


if __name__ == "__main__":
    main()
