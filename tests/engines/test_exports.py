"""Every engine computes what we do, on exports it loads itself. Run by `make test-engines`, which sets engines up.

`PESC_ENGINES` is the folder of the engines' environments; `PESC_ENGINE_SUBJECT` a tuned parallel + swiglu model to use
in place of one with random experts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINES = Path(os.environ.get("PESC_ENGINES", ROOT / ".engines"))
FORMATS = {
    "smollm2": ["granitemoeshared", "qwen2_moe", "gguf-f32", "gguf-f16", "gguf-q8_0"],
    "granite": ["granitemoeshared", "gguf-f32"],
    "qwen2": ["qwen2_moe", "gguf-f32"],
    "qwen3": ["qwen3_next", "gguf-f32"],
}

pytestmark = pytest.mark.engines


def _python(engine: str) -> str:
    python = ENGINES / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}: `make test-engines` sets it up")
    return str(python)


def _run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(ROOT / "engines" / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("base", FORMATS)
def test_engines_agree_with_our_fp32_forward(base: str, tmp_path: Path) -> None:
    vllm, llamacpp = _python("vllm"), _python("llamacpp")
    subject = os.environ.get("PESC_ENGINE_SUBJECT") if base == "smollm2" else None
    if subject is None:
        subject = str(tmp_path / base)
        _run("subject.py", subject, "--base", base)
    out = tmp_path / "rows.json"
    formats = ",".join(FORMATS[base])
    print(_run("compare.py", subject, "--formats", formats, "--vllm", vllm, "--llamacpp", llamacpp, "--json", str(out)))
    rows = json.loads(out.read_text())
    assert len(rows) == sum(1 if name.startswith("gguf") else 2 for name in FORMATS[base])
    assert all(row["passed"] for row in rows)
    exact = [row for row in rows if row["format"] not in ("gguf-f16", "gguf-q8_0")]
    assert max(row["largest"] for row in exact) <= 1e-4
    assert all(row["greedy"] == row["greedy_of"] >= 100 for row in exact)
