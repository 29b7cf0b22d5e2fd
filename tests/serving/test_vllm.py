"""`pesc serve` by the real vLLM, in its own environment: the guard stands in front of every route."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import pesc
from checkpoints import tiny_tokenizer
from pesc import PescConfig

pytestmark = pytest.mark.engines
pytest.importorskip("vllm")

KEY = "secret"
JSON = {"Content-Type": "application/json"}
HI = [{"role": "user", "content": "hi"}]
_SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with LoRA, so that a folded folder has to be written first; vLLM wants heads of 32 or more."""
    root = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    model = pesc.craft(pesc.load(root / "dense"), PescConfig(num_experts=4, adapter_dim=8))
    pesc.save_adapter(pesc.add_lora(model, LoraConfig(r=4, target_modules=["q_proj"])), root / "run" / "adapter")
    return root / "run"


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    code = f"from pesc.serving.server import serve; serve({str(run)!r}, port=8137, engine='vllm')"
    before = set(Path(tempfile.gettempdir()).glob("pesc-serve-*"))
    # vLLM's command line asks for the version of a package called vllm; the build for CPUs is called vllm-cpu.
    metadata = run.parent / "packages" / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    packages = os.pathsep.join([str(metadata.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | _SMALL | {"PESC_API_KEY": KEY, "PYTHONPATH": packages}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    address, deadline = "http://127.0.0.1:8137", time.monotonic() + 300
    try:
        while ask(f"{address}/health", key=None)[0] != 200:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        yield address
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert len(family) > 2
        assert psutil.wait_procs(family, timeout=30)[1] == []
    assert set(Path(tempfile.gettempdir()).glob("pesc-serve-*")) == before


def ask(url: str, body: bytes | None = None, key: str | None = KEY, method: str | None = None) -> tuple[int, str]:
    headers = JSON | ({} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models", None),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 2}),
        ("/invocations", {"messages": HI, "max_tokens": 2}),
        ("/tokenize", {"prompt": "hi"}),
        ("/metrics", None),
    ],
)
def test_every_route_wants_the_key(url: str, path: str, body: Any) -> None:
    data = None if body is None else json.dumps({"model": "run"} | body).encode()
    for wrong in (None, "other"):
        status, answer = ask(url + path, data, wrong)
        assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
    assert ask(url + path, data)[0] == 200


def test_streams_and_refuses_large_bodies(url: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    chunks = client.chat.completions.create(model="run", messages=HI, max_tokens=5, stream=True)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert ask(f"{url}/v1/chat/completions", b"x" * (2**16 + 32 * 4096 + 1))[0] == 413
    assert ask(f"{url}/v1/chat/completions", json.dumps({"messages": HI, "max_tokens": 2}).encode())[0] == 200


def test_a_client_that_leaves_ends_its_generation(url: str) -> None:
    def metric(name: str) -> float:
        return float(re.search(rf"^vllm:{name}{{.*}} (.+)$", ask(f"{url}/metrics")[1], re.M)[1])

    body = json.dumps({"messages": HI, "max_tokens": 4000, "ignore_eos": True})
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"} | JSON)
    deadline = time.monotonic() + 60
    for running in (1, 0):
        while metric("num_requests_running") != running:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        connection.close()
    assert metric("generation_tokens_total") < 4000
