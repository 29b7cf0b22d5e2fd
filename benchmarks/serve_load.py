"""`pesc serve` under load and attack: clients with short, long, cancelled, oversized, malformed and absurd requests.

Each answer is compared with that of the same request alone; /health is asked four times a second; the memory of the
server's processes is read each second; at the end, nothing may still be generating.
Run: python benchmarks/serve_load.py --engine transformers; ten minutes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pesc

KEY, CONTEXT, NAME = "secret", 4096, "crafted"
CHAT = "/v1/chat/completions"
MARKS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
LETTERS = {str(i): -100 for i, token in enumerate(TOKENS) if token not in "abcdefghijklmnopqrstuvwxyz"}
"""A bias to letters: answers do not end early, and none is half a character."""
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
MALFORMED = [b"", b"{bad", b"\xff\xfe", b"[1]", b"[" * 50_000, b"{}", b'{"messages": 1}', b'{"prompt": {}}']
ABSURD: list[dict[str, Any]] = [
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"temperature": -1},
    {"temperature": 1e30},
    {"top_p": 7},
    {"messages": [{"role": "user", "content": 1}]},
    {"logit_bias": {"2": 1e9}},
    {"stop": 5},
    {"seed": "x"},
]


def say(text: str, **settings: Any) -> dict[str, Any]:
    """A chat request, greedy unless the settings say otherwise."""
    message = [{"role": "user", "content": text}]
    return {"model": NAME, "messages": message, "temperature": 0, "max_tokens": 8, "logit_bias": LETTERS} | settings


CHECKED: dict[str, list[dict[str, Any]]] = {
    "short": [say(f"hello {n}") for n in range(8)],
    "seeded": [say("sing", temperature=1.0, seed=n, max_tokens=12) for n in range(8)],
    "long": [say(f"a story {n}", max_tokens=120) for n in range(4)],
    "read much": [say("x " * 900 + str(n), max_tokens=4) for n in range(4)],
    "stopped": [say(f"count {n}", max_tokens=40, stop=["e", "zq"]) for n in range(4)],
}
"""Requests whose answers are known."""
OTHER = ("cancelled", "left", "oversized", "beyond context", "malformed", "absurd", "wrong key", "half open")


@dataclass
class Record:
    """What the clients saw."""

    requests: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    short: list[float] = field(default_factory=list)


def make_model(folder: Path) -> Path:
    """A small random crafted model with a token a byte, of a size that vLLM takes too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 264}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = LlamaConfig(
        **sizes, **heads, max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=None, eos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=MARKS[0],
        eos_token=MARKS[2],
        chat_template="{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}",
    ).save_pretrained(folder / "dense")
    return pesc.craft_checkpoint(folder / "dense", folder / NAME, pesc.PescConfig(num_experts=4, adapter_dim=16))


@contextmanager
def serving(model: Path, engine: str, port: int) -> Iterator[psutil.Process]:
    """A server that is ready, as a process."""
    # Not by its command, which vLLM's environment has no need of.
    code = f"from pesc.serving.server import serve; serve({str(model)!r}, engine={engine!r}, port={port})"
    command = [sys.executable, "-c", code]
    with (model.parent / "server.log").open("w") as log:
        environment = os.environ | VLLM | {"PESC_API_KEY": KEY}
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        while True:
            if server.poll() is not None:
                sys.exit((model.parent / "server.log").read_text()[-4000:])
            try:
                if ask(port, "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.5)
        yield psutil.Process(server.pid)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


def ask(port: int, path: str, body: bytes | None = None, key: str = KEY) -> tuple[int, bytes]:
    """Status and body of an answer."""
    connection = post(port, path, body, key)
    try:
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def post(port: int, path: str, body: bytes | None, key: str = KEY) -> http.client.HTTPConnection:
    """A connection on which a request was sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, body, headers)
    return connection


def answer_of(port: int, request: dict[str, Any], stream: bool) -> str:
    """The text of an answer, or its status and message if it has none."""
    status, body = ask(port, CHAT, json.dumps(request | {"stream": stream}).encode())
    if status != 200:
        return f"{status}: {body[:300]!r}"
    if not stream:
        return json.loads(body)["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event.get("choices", [])]
    return "".join(pieces) if all("error" not in event for event in events) else str(events[-1])


class Client:
    """Sends requests of all kinds, one after the other."""

    def __init__(self, port: int, number: int, expected: dict[str, list[str]], record: Record) -> None:
        self.port, self.expected, self.record, self.random = port, expected, record, random.Random(number)

    def run(self, until: float) -> None:
        """Send requests up to a time."""
        while time.monotonic() < until:
            kind = self.random.choice([*CHECKED, *CHECKED, *OTHER])
            try:
                wrong = self.check(kind) if kind in CHECKED else self.trouble(kind)
            except (OSError, http.client.HTTPException, ValueError) as error:
                wrong = repr(error)
            self.record.requests[kind] += 1
            if wrong:
                self.record.wrong.append(f"{kind}: {wrong}")

    def check(self, kind: str) -> str | None:
        """Ask what is known; what is wrong with the answer, if anything."""
        number = self.random.randrange(len(CHECKED[kind]))
        start = time.monotonic()
        got = answer_of(self.port, CHECKED[kind][number], self.random.random() < 0.5)
        if kind == "short":
            self.record.short.append(time.monotonic() - start)
        return None if got == self.expected[kind][number] else f"{got!r} is not {self.expected[kind][number]!r}"

    def trouble(self, kind: str) -> str | None:
        """Be a client that nobody wants; what is wrong with the refusal, if anything."""
        endless = json.dumps(say("for ever", max_tokens=CONTEXT // 2, stream=True)).encode()
        if kind == "half open":
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-")
                time.sleep(self.random.random() * 3)
            return None
        if kind in ("cancelled", "left"):
            connection = post(self.port, CHAT, endless)
            if kind == "cancelled":
                answer = connection.getresponse()
                for _ in range(self.random.randrange(1, 8)):
                    answer.readline()
                answer.close()
            connection.close()
            return None
        refusals: dict[str, Callable[[], tuple[bytes, set[int]]]] = {
            "oversized": lambda: (b"x" * (2**16 + 32 * CONTEXT + 1 + self.random.randrange(2**22)), {413}),
            "beyond context": lambda: (
                json.dumps(say("x" * (CONTEXT + self.random.randrange(50_000)))).encode(),
                {400},
            ),
            "malformed": lambda: (self.random.choice(MALFORMED), {400, 422}),
            "absurd": lambda: (
                json.dumps(say("hi") | self.random.choice(ABSURD)).encode(),
                {200, 400, 422},
            ),  # vLLM clamps some
            "wrong key": lambda: (endless, {401}),
        }
        body, allowed = refusals[kind]()
        status, text = ask(self.port, CHAT, body, "other" if kind == "wrong key" else KEY)
        self.record.refused += status in allowed
        return None if status in allowed else f"{status} for {body[:200]!r}: {text[:200]!r}"


def watch(port: int, server: int, until: float) -> tuple[list[float], list[float]]:
    """Seconds that /health took, four times a second, and memory of all the server's processes in MB, once a second.

    In a process of its own, for which the clients' work is no reason to wait.
    """
    health: list[float] = []
    memory: list[float] = []
    while time.monotonic() < until:
        start = time.monotonic()
        assert ask(port, "/health")[0] == 200
        health.append(time.monotonic() - start)
        if len(health) % 4 == 1:
            memory.append(sum(each.memory_info().rss for each in family(psutil.Process(server))) / 1e6)
        time.sleep(0.25)
    return health, memory


def family(server: psutil.Process) -> list[psutil.Process]:
    """The server's processes."""
    return [server, *server.children(recursive=True)]


def idle_share(server: psutil.Process, seconds: float = 5) -> float:
    """Processor time that the server takes, as a share of one core, while nobody asks."""

    def used() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in family(server))

    time.sleep(2)
    start = used()
    time.sleep(seconds)
    return (used() - start) / seconds


def measure(port: int, server: psutil.Process, clients: int, seconds: float) -> dict[str, Any]:
    """All figures of one run."""
    expected = {kind: [answer_of(port, request, False) for request in known] for kind, known in CHECKED.items()}
    record, until = Record(), time.monotonic() + seconds
    work = [Client(port, number, expected, record).run for number in range(clients)]
    threads = [threading.Thread(target=run, args=(until,)) for run in work]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        watching = pool.submit(watch, port, server.pid, until)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        health, memory = watching.result()
    steps = max(1, len(memory) // 10)
    return {
        "clients": clients,
        "minutes": round((time.monotonic() - until + seconds) / 60, 2),
        "requests": sum(record.requests.values()),
        "kinds": dict(record.requests),
        "refused": record.refused,
        "wrong": len(record.wrong),
        "wrong examples": record.wrong[:10],
        "health seconds": spread(health),
        "short answer seconds": spread(record.short),
        "memory MB": [round(each) for each in memory[::steps]] + [round(memory[-1])],
        "processor share when idle": round(idle_share(server), 3),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    ordered = sorted(values)
    middle = statistics.median(ordered)
    return {"p50": round(middle, 3), "p99": round(ordered[int(0.99 * len(ordered))], 3), "max": round(ordered[-1], 3)}


def main() -> None:
    """Measure, print, and exit with 1 if an answer was wrong, /health slow, or something is still generating."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(make_model(Path(folder)), arguments.engine, port) as server,
    ):
        figures = measure(port, server, arguments.clients, 60 * arguments.minutes)
    print(json.dumps({"engine": arguments.engine} | figures, indent=1))
    leaks = figures["processor share when idle"] > 0.3
    sys.exit(1 if figures["wrong"] or figures["health seconds"]["max"] > 1 or leaks else 0)


if __name__ == "__main__":
    main()
