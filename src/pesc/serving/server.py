"""`pesc serve`: a model behind OpenAI's API on this machine, by vLLM where it is installed, else by transformers."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from pesc.crafting.load import ModelRef, locate
from pesc.machine.quiet import quiet_libraries

Engine = Literal["auto", "vllm", "transformers"]

_NEEDED = ("fastapi", "uvicorn", "openai", "jinja2")


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    engine: Engine = "auto",
) -> None:
    """Serve a model until Ctrl-C.

    Args:
        model: whatever `pesc.load` takes; the last part of its path is the name that clients ask for.
        host: address to bind.
        port: 0 takes any free one.
        api_key: what clients must send; None lets everyone in who reaches the address.
        engine: "auto" is vLLM where it is installed, and transformers elsewhere.

    Raises:
        FileNotFoundError, ValueError: as `pesc.load` does, and for settings or packages that do not do.
        OSError: when the address cannot be bound, or vLLM failed.
    """
    if api_key == "":
        raise ValueError("api_key is empty: give a key, or leave it out to let everyone in")
    use_vllm = engine != "transformers" and importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not use_vllm:
        raise ValueError("engine ('vllm') is not installed here: pip install vllm, or use engine='transformers'")
    if not use_vllm:
        _check_packages()
    ref = locate(model)
    _ = ref.base
    with _bind(host, port) as listener:
        if api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print(f"warning: everyone who reaches {host} can use this model: set --api-key", file=sys.stderr)
        if use_vllm:
            # vLLM binds the address itself; here it was only tried, before minutes of loading.
            port = listener.getsockname()[1]
            listener.close()
            _serve_by_vllm(ref, host, port, api_key)
        else:
            _serve_by_transformers(ref, listener, api_key)


def _check_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'serving needs {", ".join(missing)}: pip install "pesc-moe[serve]"')


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise ValueError(f"port ({port}) must be from 0, for any free one, to 65535")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # Else a port is refused for a minute after the server that used it has stopped.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot serve on {host}:{port} ({error.strerror}): give another --port, 0 for any free one, or an "
            "address of this machine as --host"
        ) from error
    return listener


def _name(model: ModelRef) -> str:
    return Path(os.path.abspath(Path(model.name).expanduser())).name


def _load(model: ModelRef) -> tuple[Any, Any]:
    with quiet_libraries():
        return model.load(folded=True), model.tokenizer()


def _serve_by_transformers(model: ModelRef, listener: socket.socket, api_key: str | None) -> None:
    import uvicorn
    from transformers.utils import logging

    from pesc.serving.app import build_app

    loaded, tokenizer = _load(model)
    if torch.cuda.is_available():
        loaded.to("cuda")
    # It logs each request as a warning; uvicorn's log has them.
    logging.set_verbosity_error()
    app = build_app(_name(model), loaded, tokenizer, api_key)
    config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=2)
    listener.listen()
    address, port = listener.getsockname()[:2]
    print(f"{_name(model)} at http://{f'[{address}]' if ':' in address else address}:{port}/v1", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn stops in good order, then raises it
        uvicorn.Server(config).run(sockets=[listener])


def _serve_by_vllm(model: ModelRef, host: str, port: int, api_key: str | None) -> None:
    if model.kind != "adapter":
        _run_vllm(model.folder, _name(model), host, port, api_key)
        return
    with tempfile.TemporaryDirectory(prefix="pesc-serve-") as folder:
        loaded, tokenizer = _load(model)
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del loaded
        _run_vllm(Path(folder), _name(model), host, port, api_key)


def _run_vllm(folder: Path, name: str, host: str, port: int, api_key: str | None) -> None:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--served-model-name", name, "--host", host, "--port", str(port)]
    if locate(folder).config.dtype == torch.float32:
        command += ["--dtype", "float32"]  # of itself, vLLM rounds such weights to bfloat16
    # Not on the command line, where every user of the machine can read it.
    environment = os.environ | ({"VLLM_API_KEY": api_key} if api_key is not None else {})
    # A process group of its own: Ctrl-C reaches vLLM once, through us, and the folder outlives it.
    server = subprocess.Popen(command, env=environment, process_group=0)
    stopped = []

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        server.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = server.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and not stopped:
        raise OSError(
            f"vLLM ended with exit code {code}: its messages above say why; --engine transformers does without"
        )
