"""`pesc serve`: a model behind OpenAI's API on this machine, by vLLM where it is installed, else by transformers."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from pesc.crafting.load import ModelRef, locate
from pesc.machine.quiet import quiet_libraries
from pesc.serving import context_length

Engine = Literal["auto", "vllm", "transformers"]

# It waits for the end of its input, which comes with the end of `pesc serve`, even by a kill.
_CLEAN = """
import os, shutil, signal, sys
for process_group in sys.stdin.read().split():
    try:
        os.killpg(int(process_group), signal.SIGKILL)
    except ProcessLookupError:
        pass
shutil.rmtree(sys.argv[1])
"""
_NEEDED = ("fastapi", "uvicorn", "openai", "jinja2")


def serve(
    model: str | Path,
    *,
    base: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    engine: Engine = "auto",
) -> None:
    """Serve a model until Ctrl-C.

    Args:
        model: whatever `pesc.load` takes; the last part of its path is the name that clients ask for.
        base: as for `pesc.load`.
        host: address to bind.
        port: 0 takes any free one.
        api_key: what clients must send; None is PESC_API_KEY from the environment. Without both, everyone who reaches
            the address may enter.
        engine: "auto" is vLLM where it is installed, and transformers elsewhere.

    Raises:
        FileNotFoundError, ValueError: as `pesc.load` does; also for a missing package or a wrong setting.
        OSError: the address cannot be bound, or vLLM failed.
    """
    api_key = os.environ.get("PESC_API_KEY") if api_key is None else api_key
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise ValueError("api_key must be ASCII letters, digits and signs; leave it out to let everyone in")
    use_vllm = engine != "transformers" and importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not use_vllm:
        raise ValueError("engine ('vllm') is not installed here: pip install vllm, or use engine='transformers'")
    if not use_vllm and (missing := [package for package in _NEEDED if importlib.util.find_spec(package) is None]):
        raise ValueError(f'serving needs {", ".join(missing)}: pip install "pesc-moe[serve]"')
    ref = locate(model, base=base)
    _ = ref.base  # an adapter without its base cannot be served
    name = Path(os.path.abspath(Path(model).expanduser())).name
    with _bind(host, port) as listener:
        if api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print(f"warning: everyone who reaches {host} can use this model: set PESC_API_KEY", file=sys.stderr)
        if not use_vllm:
            return _serve_by_transformers(ref, name, listener, api_key)
        port = listener.getsockname()[1]
    # vLLM binds the address itself; it was only tried, before minutes of loading.
    _serve_by_vllm(ref, name, host, port, api_key)


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


def _load(model: ModelRef) -> tuple[Any, Any]:
    with quiet_libraries():
        return model.load(folded=True), model.tokenizer()


def _serve_by_transformers(model: ModelRef, name: str, listener: socket.socket, api_key: str | None) -> None:
    import uvicorn
    from transformers.utils import logging

    from pesc.serving.app import build_app
    from pesc.serving.http import Protocol
    from pesc.serving.middleware import Guard
    from pesc.serving.requests import read

    loaded, tokenizer = _load(model)
    if torch.cuda.is_available():
        loaded.to("cuda")
    logging.set_verbosity_error()  # it logs each request as a warning, as uvicorn does
    app = Guard(build_app(name, loaded, tokenizer), api_key, context_length(loaded.config), partial(read, name=name))
    config = uvicorn.Config(app, http=Protocol, ws="none", log_level="info", timeout_graceful_shutdown=2)
    sys.setswitchinterval(0.0005)  # of itself, answering waits up to 5 ms for generating before every system call
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # each connection takes one
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2**14)), hard))
    listener.listen()
    address, port = listener.getsockname()[:2]
    print(f"{name} at http://{f'[{address}]' if ':' in address else address}:{port}/v1", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn stops in good order, then raises it
        uvicorn.Server(config).run(sockets=[listener])


def _serve_by_vllm(model: ModelRef, name: str, host: str, port: int, api_key: str | None) -> None:
    temporary = Path(tempfile.mkdtemp(prefix="pesc-serve-"))
    cleaner = [sys.executable, "-c", _CLEAN, str(temporary)]
    with subprocess.Popen(cleaner, stdin=subprocess.PIPE, text=True, process_group=0) as cleaning:
        folder = model.folder
        if model.kind == "adapter":
            folder = temporary
            for part in _load(model):
                part.save_pretrained(folder)
        config = locate(folder).config
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
        command += ["--served-model-name", name, "--host", host, "--port", str(port)]
        command += ["--middleware", "pesc.serving.middleware.Guard"]
        if config.dtype == torch.float32:
            command += ["--dtype", "float32"]  # of itself, vLLM rounds such weights to bfloat16
        # Not on the command line, where every user of the machine can read the key.
        keys = {} if api_key is None else dict.fromkeys(("PESC_API_KEY", "VLLM_API_KEY"), api_key)
        _run(command, os.environ | keys | {"PESC_CONTEXT": str(context_length(config))}, cleaning.stdin)


def _run(command: list[str], environment: dict[str, str], cleaner: Any) -> None:
    # A process group of its own: Ctrl-C reaches vLLM once, through us, and the folder outlives it.
    server = subprocess.Popen(command, env=environment, process_group=0)
    print(server.pid, file=cleaner, flush=True)
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
        raise OSError(f"vLLM ended with exit code {code}: its messages above say why; or use --engine transformers")
