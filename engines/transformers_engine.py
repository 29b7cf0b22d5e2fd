"""Run a stock model with transformers, in an environment or a process where `pesc` cannot be imported.

Usage: python transformers_engine.py JOB.json OUT.json
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path


class _NoPesc(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname.split(".")[0] == "pesc":
            raise ImportError("pesc is hidden: a stock model must load without it")


sys.meta_path.insert(0, _NoPesc())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


@torch.no_grad()
def main(job: dict) -> dict:
    """Log-probabilities of a text's tokens and a greedy continuation of a prompt."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    text = torch.tensor([job["text"]])
    logits = model(text).logits[0, :-1].double()
    logprobs = logits.log_softmax(-1).gather(-1, text[0, 1:, None])[:, 0].tolist()
    tokens, cache, new = list(job["prompt"]), None, torch.tensor([job["prompt"]])
    for _ in range(job["greedy_tokens"]):
        output = model(new, past_key_values=cache, use_cache=True)
        cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
        tokens.append(int(new))
    assert "pesc" not in sys.modules
    return {
        "engine": f"transformers {transformers.__version__}, {type(model).__name__}",
        "logprobs": logprobs,
        "greedy": tokens[len(job["prompt"]) :],
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
