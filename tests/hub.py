"""A model hub on this machine: what a client asks it for is real, and what it sends is kept."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest


@dataclass
class Hub:
    """Repositories by name, each with its files."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    """Of each repository, whether it was made so."""
    commits: int = 0
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded contents by their SHA-256."""
    refuses: int | None = None
    """A status that every answer has."""


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to inside the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # large files by the older protocol
        patch.setenv("HF_TOKEN", "hf_test")
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        if self.hub.refuses:
            self._answer({"error": "no"}, self.hub.refuses)
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            there = name in self.hub.files
            self.hub.files.setdefault(name, {})
            self.hub.private.setdefault(name, wanted.get("visibility") == "private")
            self._answer({"url": f"{self.hub.address}/{name}"}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": self._oid(path.split("/preupload/")[0].removeprefix("/api/models/"), file["path"]),
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{self.hub.address}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            self._commit(name, body)
            self._answer({"commitUrl": f"{self.hub.address}/{name}/commit/1", "commitOid": "1" * 40, "hookOutput": ""})
        else:
            self._answer({"error": f"unknown: {path}"}, 404)

    def do_GET(self) -> None:
        self._answer({"id": "org/name", "sha": "1" * 40, "private": True, "tags": [], "siblings": []})

    def do_PUT(self) -> None:
        body = self._body()
        assert self.path == f"/large/{hashlib.sha256(body).hexdigest()}"
        self.hub.large[self.path.removeprefix("/large/")] = body
        self._answer({})

    def _commit(self, name: str, body: bytes) -> None:
        self.hub.commits += 1
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[name][value["path"]] = self.hub.large[value["oid"]]

    def _oid(self, name: str, path: str) -> str | None:
        """As git has it, or of a large file its SHA-256."""
        content = self.hub.files[name].get(path)
        if content is None:
            return None
        if path.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, values: Any, status: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
