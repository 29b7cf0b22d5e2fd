"""Export a crafted model to every stock format and compare other engines with our own fp32 forward.

Usage: python engines/compare.py MODEL [--formats granitemoeshared,gguf-f32,…] [--json OUT]
           [--vllm .engines/vllm/bin/python] [--llamacpp .engines/llamacpp/bin/python]

Engines run in environments of their own (`make test-engines`), and know nothing of `pesc`. An engine whose
environment is missing is left out, and said so. Exit code 1 when one of them differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pesc import fold, load
from pesc.crafting.load import locate
from pesc.interop.formats import FORMATS, export

HERE = Path(__file__).parent
TOLERANCE = 1e-4
"""Largest difference of a log-probability, where the engine and the file are fp32."""
GREEDY_TOKENS = 120
MESSAGES = [
    {"role": "user", "content": "What is 12 + 30? Answer in one line."},
    {"role": "assistant", "content": "12 + 30 = 42."},
    {"role": "user", "content": "Write a short story about a clerk in Bern."},
]
LOSSY = {"gguf-f16": 0.01, "gguf-q8_0": 0.15}
"""Files of fewer bits, in which llama.cpp rounds activations too: the largest mean difference."""
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}
_VLLM = {
    "VLLM_PLUGINS": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@dataclass
class Row:
    """One engine on one export."""

    format: str
    engine: str
    tokens: int
    largest: float
    """Largest difference of a token's log-probability."""
    mean: float
    """Mean of these differences."""
    greedy: int
    """Greedy tokens up to the first that differs."""
    greedy_of: int
    vocabulary: str
    """For GGUF: whether the file's own tokenizer and chat template give our tokens."""
    seconds: float

    @property
    def passed(self) -> bool:
        if self.format in LOSSY:
            near = self.mean <= LOSSY[self.format] and self.largest < float("inf")
        else:
            near = self.largest <= TOLERANCE and self.greedy == self.greedy_of
        return near and self.vocabulary in ("", "equal")


@torch.no_grad()
def reference(model: PreTrainedModel, text: list[int], prompt: list[int], count: int) -> dict[str, Any]:
    """Our own fp32 forward: log-probabilities of `text`'s tokens and `count` greedy tokens after `prompt`."""
    ids = torch.tensor([text])
    logits = model(ids).logits[0, :-1].double()
    logprobs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
    tokens, cache, new = list(prompt), None, torch.tensor([prompt])
    for _ in range(count):
        output = model(new, past_key_values=cache, use_cache=True)
        cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
        tokens.append(int(new))
    return {"logprobs": logprobs, "greedy": tokens[len(prompt) :]}


def make_job(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every engine is asked, and our answer."""
    model = fold(load(path, dtype="float32"))
    tokenizer = locate(path).tokenizer()
    text = (HERE / "text.txt").read_text(encoding="utf-8")
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    strings = [text, chat, *text.splitlines()]
    tokens = [tokenizer(string, add_special_tokens=False)["input_ids"] for string in strings]
    job = {
        "text": tokens[0],
        "prompt": tokens[1],
        "greedy_tokens": GREEDY_TOKENS,
        "strings": strings,
        "messages": MESSAGES,
    }
    ours = reference(model, tokens[0], tokens[1], GREEDY_TOKENS)
    return job, ours | {"tokens": tokens, "chat": chat}


def run_engine(python: str, script: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """One engine's answer, from its own environment.

    Raises:
        RuntimeError: when it fails, with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(job))
        command = [python, str(HERE / script), str(question), str(answer)]
        # A clean PYTHONPATH: nothing of ours may be importable there by accident.
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, env=clean | _QUIET | environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{script} failed on {job['model']}:\n{(done.stdout + done.stderr)[-3000:]}")
        return json.loads(answer.read_text())


def compare(format: str, ours: dict[str, Any], theirs: dict[str, Any], seconds: float) -> Row:
    """How far an engine is from us."""
    differences = [abs(a - b) for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True)]
    pairs = list(zip(ours["greedy"], theirs["greedy"], strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    vocabulary = ""
    if "tokens" in theirs:
        wrong = sum(a != b for a, b in zip(ours["tokens"], theirs["tokens"], strict=True))
        vocabulary = f"{wrong} of {len(ours['tokens'])} texts differ" if wrong else "equal"
        if theirs["chat"] != ours["chat"]:
            vocabulary += ", chat template differs"
    # NaN compares false with everything, so it would hide from max().
    largest = float("inf") if any(d != d for d in differences) else max(differences)
    mean = sum(differences) / len(differences)
    return Row(format, theirs["engine"], len(differences), largest, mean, same, len(pairs), vocabulary, seconds)


def engines_for(format: str, arguments: argparse.Namespace) -> list[tuple[str, str, dict[str, str]]]:
    """(python, script, environment variables) of the engines that run a format."""
    if format.startswith("gguf"):
        return [(arguments.llamacpp, "llamacpp_engine.py", {})]
    return [(arguments.vllm, "transformers_engine.py", {}), (arguments.vllm, "vllm_engine.py", _VLLM)]


def main() -> int:
    """Compare, print the table, return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--formats", default="")
    parser.add_argument("--vllm", default=".engines/vllm/bin/python")
    parser.add_argument("--llamacpp", default=".engines/llamacpp/bin/python")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    formats = arguments.formats.split(",") if arguments.formats else [f for f in FORMATS if f not in _NOT_STOCK]
    job, ours = make_job(arguments.model)
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for format in formats:
            try:
                file = Path(folder) / (f"{format}.gguf" if format.startswith("gguf") else format)
                exported = export(arguments.model, file, format)
            except ValueError as error:
                print(f"{format}: refused ({error})", flush=True)
                continue
            for python, script, environment in engines_for(format, arguments):
                if not Path(python).exists():
                    print(f"{format}: left out, no {python}: run `make test-engines`", flush=True)
                    continue
                start = time.perf_counter()
                try:
                    theirs = run_engine(python, script, job | {"model": str(exported)}, environment)
                except RuntimeError as error:
                    print(error, flush=True)
                    failed = True
                    continue
                rows.append(compare(format, ours, theirs, time.perf_counter() - start))
                print(_line(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) | {"passed": row.passed} for row in rows], indent=1) + "\n")
    return int(failed or not rows or not all(row.passed for row in rows))


_NOT_STOCK = ("pesc", "adapter", "stock", "camelidae", "sparsetral")


def _line(row: Row) -> str:
    verdict = "ok" if row.passed else "DIFFERS"
    vocabulary = f", tokenizer {row.vocabulary}" if row.vocabulary else ""
    return (
        f"{row.format:17} {row.engine}: largest difference {row.largest:.1e} (mean {row.mean:.1e}) over {row.tokens} "
        f"tokens, greedy {row.greedy} of {row.greedy_of}{vocabulary}, {row.seconds:.0f} s: {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
