"""`pesc serve`: the real server in a process of its own, asked by the real OpenAI client."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclopts import UnknownOptionError
from openai import APIStatusError, APITimeoutError, AuthenticationError, BadRequestError, NotFoundError, OpenAI
from peft import LoraConfig
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, parse_assistant_message

import pesc
from checkpoints import tiny_dense
from pesc import PescConfig
from pesc.cli import app as command
from pesc.crafting.surgery import expert_parameters
from pesc.serving.app import _ChatHandler, build_app
from pesc.serving.middleware import CLIENT, Client
from pesc.serving.requests import Request
from pesc.serving.server import serve

CONFIG = PescConfig(num_experts=4, adapter_dim=8)
CONTEXT = 16384
HI = [{"role": "user", "content": "hi"}]
KEY = "secret"
FEW = 150
"""Open files that a server may have, at first."""


@dataclass
class Server:
    """A running server."""

    name: str
    process: subprocess.Popen
    log: Path
    url: str = ""

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while not (found := re.search(rf"^{self.name} at (http://\S+)/v1$", self.log.read_text(), re.M)):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        self.url = found[1]

    def client(self, api_key: str = KEY, timeout: float = 60) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, timeout=timeout, max_retries=0)

    def ask(self, **settings: Any) -> Any:
        settings = {"model": self.name, "messages": HI, "temperature": 0, **settings}
        return self.client().chat.completions.create(**settings)

    def post(self, path: str, body: bytes, key: str = KEY) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, body, headers(key))
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


def start(folder: Path, log: Path, **settings: Any) -> Server:
    few = f"from resource import *; setrlimit(RLIMIT_NOFILE, ({FEW}, getrlimit(RLIMIT_NOFILE)[1]))"
    code = f"{few}; from pesc.serving.server import serve; serve({str(folder)!r}, port=0, **{settings!r})"
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=stream, stderr=subprocess.STDOUT)
    return Server(folder.name, process, log)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("served")
    dense = tiny_dense(root / "dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    torch.manual_seed(0)
    model = pesc.add_lora(pesc.craft(pesc.load(dense), CONFIG), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name in expert_parameters(model):
            torch.nn.init.normal_(parameter.data, std=0.2)
    pesc.save_adapter(model, root / "run" / "adapter")
    pesc.fold(model).save_pretrained(root / "crafted")
    pesc.load_tokenizer(dense).save_pretrained(root / "crafted")
    return {"dense": dense, "run": root / "run", "crafted": root / "crafted"}


@pytest.fixture(scope="module")
def servers(folders: dict[str, Path]) -> Iterator[dict[str, Server]]:
    logs = folders["run"].parent
    started = {
        "crafted": start(folders["crafted"], logs / "crafted.log", api_key=KEY),
        "run": start(folders["run"], logs / "run.log", engine="transformers"),
    }
    try:
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.process.kill()
            server.process.wait()


@pytest.fixture
def server(servers: dict[str, Server]) -> Iterator[Server]:
    """The crafted folder behind a key; each test must leave it able to answer."""
    yield servers["crafted"]
    assert servers["crafted"].ask(max_tokens=2).usage.completion_tokens == 2


def letters_only(tokenizer: Any) -> dict[str, int]:
    """A bias to tokens that are text by themselves, for answers of which each byte shows."""
    letters = {tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"}
    return {str(token): -100 for token in range(264) if token not in letters}


def expected(folder: Path, bias: dict[str, int], count: int) -> str:
    model, tokenizer = pesc.fold(pesc.load(folder)), pesc.load_tokenizer(folder.parent / "dense")
    prompt = tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    biases = {(int(token),): float(value) for token, value in bias.items()}
    tokens = model.generate(**prompt, max_new_tokens=count, do_sample=False, sequence_bias=biases)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", ["crafted", "run"])
def test_streams_what_the_model_says(servers: dict[str, Server], folders: dict[str, Path], name: str) -> None:
    bias = letters_only(pesc.load_tokenizer(folders["dense"]))
    said = expected(folders[name], bias, 12)
    chunks = list(servers[name].ask(max_tokens=12, logit_bias=bias, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == said
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert servers[name].ask(max_tokens=12, logit_bias=bias).choices[0].message.content == said


def test_has_one_model_with_one_name(server: Server) -> None:
    assert [model.id for model in server.client().models.list().data] == ["crafted"]
    assert server.ask(max_tokens=1).model == "crafted"
    with pytest.raises(NotFoundError, match="only one is 'crafted'"):
        server.ask(model="HuggingFaceTB/SmolLM2-135M")


def test_wants_the_key(server: Server) -> None:
    for wrong in ("other", KEY + "x", "é"):
        status, answer = server.post("/v1/chat/completions", b"{}", wrong)
        assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(AuthenticationError):
        server.client(api_key="other").models.list()
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert answer.status == 200


def test_stops_at_max_tokens_and_at_the_end_of_the_context(server: Server) -> None:
    answer = server.ask(max_completion_tokens=5, logit_bias={"2": -100})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)
    template = server.ask(messages=[{"role": "user", "content": ""}], max_tokens=1).usage.prompt_tokens
    prompt = [{"role": "user", "content": "x" * (CONTEXT - template - 3)}]
    answer = server.ask(messages=prompt, max_tokens=50, logit_bias={"2": -100})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_refuses_prompts_beyond_the_context(server: Server) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError, match=rf"fewer than the model's context \({CONTEXT}\)"):
            server.ask(messages=[{"role": "user", "content": "x" * (CONTEXT + 1)}], stream=stream)
    with pytest.raises(APIStatusError, match="at most") as error:
        server.ask(messages=[{"role": "user", "content": "x" * 20_000_000}])
    assert error.value.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{bad",
        b"\xff\xfe",
        b"[1]",
        b"[" * 100_000,
        b"{}",
        b'{"messages": "hi"}',
        b'{"messages": []}',
        b'{"messages": [{"role": "user", "content": 1}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]}',
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}',
        b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": "many"}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": -1}',
        b'{"messages": [{"role": "user", "content": "hi"}], "n": 2}',
        b'{"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_object"}}',
        b'{"messages": [{"role": "user", "content": "hi"}], "logit_bias": {"99999": 1}}',
        b'{"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"chat_template": "x"}}',
        b'{"messages": [{"role": "user", "content": "hi"}], "unheard_of": 1}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "high"}',
        b'{"messages": [{"role": "user", "content": "hi"}], "tool_choice": "required"}',
        b'{"messages": [{"role": "user", "content": "hi"}], "generation_config": "{}"}',
        b'{"messages": [{"role": "user", "content": "hi"}], "stop": ["a", "b", "c", "d", "e"]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"max_length": 20000000}}',
        b'{"messages": [{"role": "user", "content": "hi"}], "suffix": "a field of another path"}',
    ],
)
def test_answers_bad_requests_with_the_reason(server: Server, body: bytes) -> None:
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 400, answer
    error = json.loads(answer)["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "field"),
    [
        *(("/v1/chat/completions", field) for field in ("tool_choice", "top_logprobs", "logprobs", "n", "functions")),
        *(("/v1/completions", field) for field in ("best_of", "echo", "suffix", "messages_")),
        *(("/v1/responses", field) for field in ("stop", "logit_bias", "reasoning", "previous_response_id")),
    ],
)
def test_names_the_fields_that_it_does_not_support(server: Server, path: str, field: str) -> None:
    value: Any = {"stop": "x", "logit_bias": {"1": 1}}.get(field, 5)
    body = {"messages": HI} if "chat" in path else {"prompt": "hi"} if "responses" not in path else {"input": "hi"}
    status, answer = server.post(path, json.dumps(body | {field: value}).encode())
    assert status == 400, answer
    assert field in json.loads(answer)["error"]["message"]


def test_connections_that_say_nothing_block_nobody(server: Server) -> None:
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with ExitStack() as stack:
        for _ in range(FEW + 50):
            stack.enter_context(socket.create_connection(address)).sendall(b"POST /v1")
        assert server.client(timeout=10).models.list().data


def test_other_methods_are_refused_and_no_page_of_another_origin_may_read(server: Server) -> None:
    for method, path in (("GET", "/v1/completions"), ("OPTIONS", "/v1/chat/completions"), ("DELETE", "/v1/models")):
        origin = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        request = urllib.request.Request(server.url + path, headers=headers(KEY) | origin, method=method)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        assert error.value.code == 405
        assert error.value.headers["Allow"]
        assert error.value.headers["Access-Control-Allow-Origin"] is None


def test_says_that_the_header_is_missing(server: Server) -> None:
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps({"messages": HI}).encode())
    request.add_header("Authorization", f"Bearer {KEY}")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert (error.value.code, "application/json" in error.value.read().decode()) == (400, True)


def test_nobody_can_unload_or_exchange_the_model(server: Server) -> None:
    assert server.post("/reset", b"{}")[0] == 404
    assert server.post("/load_model", b'{"model": "other"}')[0] == 404
    assert server.post("/v1/audio/transcriptions", b"{}")[0] == 404


def test_streams_end_with_the_mark_and_errors_in_them_are_json(server: Server) -> None:
    body: dict[str, Any] = {"messages": HI, "max_tokens": 2, "stream": True}
    _, answer = server.post("/v1/chat/completions", json.dumps(body).encode())
    assert answer.endswith("data: [DONE]\n\n")
    body |= {"logit_bias": {"99999": 1}}
    _, answer = server.post("/v1/chat/completions", json.dumps(body).encode())
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    assert any("error" in json.loads(event) for event in events[:-1])


def test_a_stop_text_ends_the_answer_and_is_not_in_it(server: Server, folders: dict[str, Path]) -> None:
    bias = letters_only(pesc.load_tokenizer(folders["dense"]))
    said = expected(folders["crafted"], bias, 12)
    stop = said[5:8]
    before = said[: said.find(stop)]
    asked = {"max_tokens": 12, "logit_bias": bias, "stop": [said[:2] + "!", stop]}
    chunks = [chunk.choices[0] for chunk in server.ask(stream=True, **asked)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == before
    whole = server.ask(**asked)
    assert whole.choices[0].message.content == before
    assert [chunks[-1].finish_reason, whole.choices[0].finish_reason] == ["stop", "stop"]
    assert whole.usage.completion_tokens == said.find(stop) + 3
    text = server.client().completions.create(model="crafted", prompt="abc", max_tokens=9, logit_bias=bias)
    stop = text.choices[0].text[3:5]
    stopped = server.client().completions.create(
        model="crafted", prompt="abc", max_tokens=9, logit_bias=bias, stop=stop
    )
    assert stopped.choices[0].text == text.choices[0].text.partition(stop)[0]


def test_a_family_with_tool_calls_leaves_out_the_stop_text_too() -> None:
    CLIENT.set(Client(Request(stop="x")))
    handler = _ChatHandler(ModelManager(), GenerationState())
    message = handler._build_completion("id", "abxcd", "name", finish_reason="stop")["choices"][0]["message"]
    assert message["content"] == "ab"


def test_a_long_answer_does_not_stop_the_others(server: Server) -> None:
    endless = server.ask(stream=True, max_tokens=CONTEXT, temperature=2.0, seed=1, logit_bias={"2": -100})
    events = iter(endless)
    next(events)
    alone = server.ask(max_tokens=8, temperature=2.0, seed=7).choices[0].message.content
    assert server.ask(max_tokens=8, temperature=2.0, seed=7).choices[0].message.content == alone
    assert next(events).choices[0].finish_reason is None
    endless.close()
    assert server.ask(max_tokens=8, temperature=2.0, seed=7).choices[0].message.content == alone


def test_completions_and_responses(server: Server) -> None:
    client = server.client()
    bias = {token: -100 for token in map(str, range(264)) if token != "70"}
    answer = client.completions.create(model="crafted", prompt="abc", max_tokens=3, logit_bias=bias)
    assert (answer.usage.prompt_tokens, answer.choices[0].text) == (3, "ddd")
    assert client.completions.create(model="crafted", prompt="abc", max_tokens=2, logit_bias=None).choices
    assert client.responses.create(model="crafted", input="abc", max_output_tokens=3).status == "completed"
    spoken = client.responses.create(
        model="crafted",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "abc"}]}],
        max_output_tokens=3,
        stream=True,
    )
    assert [event.type for event in spoken][-1] == "response.completed"


def test_accepts_what_clients_send_back_or_leave_empty(server: Server) -> None:
    first = server.ask(max_tokens=2, stop=[], logit_bias={}, n=1, presence_penalty=0, response_format={"type": "text"})
    history = [*HI, first.choices[0].message.model_dump(), {"role": "user", "content": [{"type": "text", "text": "x"}]}]
    assert server.ask(messages=history, max_tokens=2).usage.completion_tokens == 2


def test_a_crafted_model_calls_tools_as_its_family_does(folders: dict[str, Path]) -> None:
    model, tokenizer = pesc.load(folders["crafted"]), pesc.load_tokenizer(folders["crafted"])
    model.config.base_model_type = "qwen2"
    build_app("crafted", model, tokenizer)
    tokens = tokenizer('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><|im_end|>')["input_ids"]
    _, _, calls = parse_assistant_message(tokenizer, model, tokens, [1])
    assert [(call.name, call.arguments) for call in calls] == [("f", '{"a": 1}')]


def test_sampling_is_asked_for_by_temperature(server: Server) -> None:
    texts = {server.ask(max_tokens=8, temperature=2.0, seed=seed).choices[0].message.content for seed in range(3)}
    assert len(texts) > 1
    greedy, tiny = (server.ask(max_tokens=8, temperature=t).choices[0].message.content for t in (0, 1e-40))
    assert greedy == tiny


def test_a_seed_does_not_decide_what_comes_after_it(server: Server) -> None:
    def ask(**seed: int) -> str:
        return server.ask(max_tokens=8, temperature=2.0, **seed).choices[0].message.content

    assert len({(ask(seed=7), ask()) for _ in range(4)}) > 1


def test_a_seed_gives_the_same_answer_with_other_clients_around(server: Server) -> None:
    def ask(seed: int) -> str:
        return server.ask(max_tokens=8, temperature=2.0, seed=seed).choices[0].message.content

    alone = ask(7)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, [7, 1, 7, 2, 7, 3]))[::2] == [alone] * 3


def test_concurrent_clients_get_their_own_answers(server: Server) -> None:
    def ask(number: int) -> str:
        messages = [{"role": "user", "content": f"tell me {number}"}]
        chunks = server.ask(messages=messages, max_tokens=8, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone


def test_generation_stops_when_its_client_leaves(server: Server) -> None:
    endless = {"max_tokens": CONTEXT, "logit_bias": {"2": -100}}
    stream = server.ask(stream=True, **endless)
    next(iter(stream))
    stream.close()
    impatient = server.client(timeout=1)
    with pytest.raises(APITimeoutError):
        impatient.chat.completions.create(model="crafted", messages=HI, **endless)
    # One that leaves before the first token, and two that wait for their turn.
    body = json.dumps({"messages": HI, "stream": True, **endless}).encode()
    for _ in range(3):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        connection.request("POST", "/v1/chat/completions", body, headers(KEY))
        connection.close()
    # To the end of the context, each would take minutes.
    assert server.client(timeout=30).chat.completions.create(model="crafted", messages=HI, max_tokens=1).choices


def test_ctrl_c_ends_it_while_it_answers(servers: dict[str, Server]) -> None:
    server = servers["run"]
    endless = {"max_tokens": CONTEXT, "logit_bias": {"2": -100}}
    next(iter(server.ask(stream=True, **endless)))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.ask, **endless)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGINT)
        # Exit code -6 would mean that the interpreter ended while torch was still at work.
        assert server.process.wait(timeout=60) == 0
        assert waiting.exception() is not None
    assert "Traceback" not in server.log.read_text()


def test_a_taken_port_is_named_before_anything_is_loaded(folders: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot serve on 127.0.0.1:{port} \(Address already in use\).*--port"):
            serve(folders["dense"], port=port)


def test_refuses_what_cannot_be_served(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        serve("nowhere at all")
    with pytest.raises(ValueError, match=r"port \(70000\)"):
        serve(folders["dense"], port=70000)
    with pytest.raises(OSError, match="cannot serve on 192.0.2.1:0"):
        serve(folders["dense"], host="192.0.2.1", port=0)
    for key in ("", " a", "a\n", "é"):
        with pytest.raises(ValueError, match="api_key must be ASCII"):
            serve(folders["dense"], api_key=key)
    with pytest.raises(ValueError, match="pip install vllm"):
        serve(folders["dense"], engine="vllm")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(ValueError, match=r'serving needs uvicorn: pip install "pesc-moe\[serve\]"'):
        serve(folders["dense"])


def test_the_command_line_takes_no_key() -> None:
    # Every user of the machine can read it.
    with pytest.raises(UnknownOptionError):
        command.parse_args(["serve", "x", "--api-key", KEY], exit_on_error=False, print_error=False)


FAKE_VLLM = """
import json, os, pathlib, shutil, subprocess, sys, time
seen = pathlib.Path(os.environ["SEEN"])
child = subprocess.Popen(["sleep", "60"])
shutil.copytree(sys.argv[2], seen)
how = {"arguments": sys.argv[1:], "environment": dict(os.environ), "processes": [os.getpid(), child.pid]}
(seen / "how.json").write_text(json.dumps(how))
(seen / "done").touch()
time.sleep(60)
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a vLLM that does nothing was given."""
    fake, seen = tmp_path / "vllm" / "entrypoints" / "cli", tmp_path / "seen"
    fake.mkdir(parents=True)
    (fake / "main.py").write_text(FAKE_VLLM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SEEN", str(seen))
    return seen


def lives(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_kill_ends_vllm_too_and_clears_its_folder_away(folders: dict[str, Path], tmp_path: Path, seen: Path) -> None:
    server = start(folders["run"], tmp_path / "log", engine="vllm")
    while not (seen / "done").exists():
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.1)
    how = json.loads((seen / "how.json").read_text())
    assert all(map(lives, how["processes"]))
    server.process.kill()
    deadline = time.monotonic() + 20
    while any(map(lives, how["processes"])) or Path(how["arguments"][1]).exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_hands_a_folded_folder_to_vllm_and_clears_it_away(folders: dict[str, Path], seen: Path) -> None:
    def interrupt() -> None:
        while not (seen / "done").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    serve(folders["run"], port=0, api_key=KEY)
    how = json.loads((seen / "how.json").read_text())
    verb, folder, *options = how["arguments"]
    assert verb == "serve"
    assert options[:5] == ["--served-model-name", "run", "--host", "127.0.0.1", "--port"]
    assert options[6:] == ["--middleware", "pesc.serving.middleware.Guard", "--dtype", "float32"]
    assert [how["environment"][name] for name in ("PESC_API_KEY", "VLLM_API_KEY")] == [KEY, KEY]
    assert how["environment"]["PESC_CONTEXT"] == str(CONTEXT)
    assert not any(KEY in argument for argument in how["arguments"])
    assert not Path(folder).exists()
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            pesc.load(seen)(tokens).logits, pesc.load(folders["run"])(tokens).logits, atol=1e-5, rtol=1e-4
        )
    assert pesc.load_tokenizer(seen).chat_template is not None


def test_warns_of_a_door_that_stands_open(
    folders: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pesc.serving.server._serve_by_transformers", lambda *_: None)
    serve(folders["dense"], host="0.0.0.0", port=0, engine="transformers")
    assert "everyone who reaches 0.0.0.0 can use this model" in capsys.readouterr().err
    serve(folders["dense"], host="0.0.0.0", port=0, api_key=KEY, engine="transformers")
    serve(folders["dense"], host="localhost", port=0, engine="transformers")
    assert capsys.readouterr().err == ""
