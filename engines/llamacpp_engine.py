"""Run a GGUF file with llama.cpp: one thread, an F32 cache, no flash attention, so that it computes in fp32.

Usage: python llamacpp_engine.py JOB.json OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import Llama


def main(job: dict) -> dict:
    """Log-probabilities of a text's tokens, a greedy continuation of a prompt, and the text's tokens by the file."""
    length = max(len(job["text"]), len(job["prompt"]) + job["greedy_tokens"]) + 8
    model = Llama(
        job["model"],
        n_ctx=length,
        n_batch=length,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
    )
    model.eval(job["text"])
    logits = model.scores[: len(job["text"]) - 1].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    totals = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
    logprobs = logits[np.arange(len(logits)), job["text"][1:]] - totals
    model.reset()
    tokens, new = list(job["prompt"]), list(job["prompt"])
    for _ in range(job["greedy_tokens"]):
        model.eval(new)
        new = [int(model.scores[model.n_tokens - 1].argmax())]
        tokens += new
    return {
        "engine": f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {model.metadata['general.architecture']}",
        "logprobs": logprobs.tolist(),
        "greedy": tokens[len(job["prompt"]) :],
        "tokens": [model.tokenize(text.encode(), add_bos=False, special=True) for text in job["strings"]],
        "chat": _chat(model, job),
    }


def _chat(model: Llama, job: dict) -> str | None:
    """The conversation as the file's own chat template writes it."""
    if "tokenizer.chat_template" not in model.metadata:
        return None
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        template=model.metadata["tokenizer.chat_template"], bos_token="", eos_token="", add_generation_prompt=True
    )
    return formatter(messages=job["messages"]).prompt


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
