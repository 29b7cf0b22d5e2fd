"""Run a stock model with vLLM on the CPU, in fp32; plugins, ours included, must be off (VLLM_PLUGINS set and empty).

Usage: python vllm_engine.py JOB.json OUT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import vllm
from vllm import LLM, SamplingParams


def main(job: dict) -> dict:
    """Log-probabilities of a text's tokens and a greedy continuation of a prompt."""
    if os.environ.get("VLLM_PLUGINS") != "":
        raise SystemExit("set VLLM_PLUGINS to nothing: a stock model must run without plugins")
    llm = LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=1024, skip_tokenizer_init=True, seed=0)
    scored = llm.generate(
        {"prompt_token_ids": job["text"]}, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    )
    rows = zip(job["text"][1:], scored[0].prompt_logprobs[1:], strict=True)
    greedy = SamplingParams(temperature=0, max_tokens=job["greedy_tokens"], ignore_eos=True, detokenize=False)
    continued = llm.generate({"prompt_token_ids": job["prompt"]}, greedy)
    return {
        "engine": f"vLLM {vllm.__version__}",
        "logprobs": [row[token].logprob for token, row in rows],
        "greedy": list(continued[0].outputs[0].token_ids),
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
