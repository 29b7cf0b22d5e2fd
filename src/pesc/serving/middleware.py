"""The one middleware around either engine: API key, limits on bodies, checked requests, and word of clients that leave.

vLLM builds it by itself (`--middleware pesc.serving.middleware.Guard`): vLLM's own key guards only paths below /v1.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Client:
    """Who waits for an answer."""

    request: Any
    """What the client asks for, as `read` returned it."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nobody waits any more; other threads may ask `left.is_set()`."""


CLIENT: ContextVar[Client] = ContextVar("CLIENT")
"""The client whose request the current task answers."""

PATIENCE = 60.0
"""Seconds for a client to send a request, and then to take each piece of the answer."""


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in the form that OpenAI's clients expect."""
    kind, code = (
        "server_error" if status >= 500 else "invalid_request_error",
        "invalid_api_key" if status == 401 else None,
    )
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)


class Guard:
    """Stands between the clients and an engine's app.

    Args:
        app: the engine's ASGI app.
        api_key: the bearer token that every request but /health must carry. Without one, PESC_API_KEY from the
            environment; without that, everyone may enter.
        context: the most tokens that the model can read, which limit the size of a body; else from PESC_CONTEXT.
        read: checks a method, a path and a body. It returns what is asked for (or None) and the body for the engine,
            and raises HTTPException to refuse. Without it, the engine checks requests by itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None = None,
        context: int | None = None,
        read: Callable[[str, str, bytes], tuple[Any, bytes]] | None = None,
    ) -> None:
        self.app = app
        self.key = (api_key or os.environ.get("PESC_API_KEY", "")).encode()
        # Far more than tokens need, escapes and tools included: beyond it, even tokenizing could eat the memory.
        self.limit = 2**16 + 32 * min(context or int(os.environ["PESC_CONTEXT"]), 2**20)
        self.read = read or (lambda _, __, body: (None, body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, take in and check the body, then let the engine answer for as long as the client waits."""
        try:
            if scope["type"] != "lifespan":
                self._check_sender(scope)
            if scope["type"] != "http":
                return await self.app(scope, receive, send)
            request, body = self.read(scope["method"], scope["path"], await self._body(receive))
        except HTTPException as error:
            return await error_response(error.status_code, error.detail, error.headers)(scope, receive, send)
        if request is not None and request.ends_with_done:
            send = _ending_with_done(send)
        await self._answer(Client(request), body, scope, receive, send)

    def _check_sender(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if not self.key:
            host = headers.get(b"host", b"").decode("latin-1")
            # A web page can give its own host name this machine's address, and then read what the server answers.
            if _is_loopback((scope.get("server") or [""])[0]) and not _is_loopback(_name_of(host)):
                raise HTTPException(403, f"Host ({host!r}) is not this machine: ask localhost, or set PESC_API_KEY")
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key)
        if not known and scope["path"] != "/health":
            challenge = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "send the server's API key: Authorization: Bearer KEY", challenge)

    async def _body(self, receive: Receive) -> bytes:
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(PATIENCE):
                while more:  # beyond the limit too: a client that is still sending would not see the answer
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HTTPException(499, "the client left before its request was complete")
                    size, more = size + len(message.get("body", b"")), message.get("more_body", False)
                    if size <= self.limit:
                        body += message.get("body", b"")
        except TimeoutError:
            raise HTTPException(408, f"the request was not complete after {PATIENCE:g} s") from None
        if size > self.limit:
            raise HTTPException(413, f"the request has {size} bytes; at most {self.limit} fit")
        return bytes(body)

    async def _answer(self, client: Client, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def watch() -> None:
            await receive()  # the body is complete: the next message says that the client has left
            client.left.set()

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await client.left.wait()
            return {"type": "http.disconnect"}

        async def deliver(message: Message) -> None:
            async with asyncio.timeout(PATIENCE):
                await send(message)

        CLIENT.set(client)
        watching = asyncio.create_task(watch())
        try:
            # When the server stops, or the client takes nothing; uvicorn would log it as a failure.
            with suppress(asyncio.CancelledError, TimeoutError):
                await self.app(scope, replay, deliver)
        finally:
            client.left.set()
            watching.cancel()


def _name_of(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _ending_with_done(send: Send) -> Send:
    streams = False

    async def ending(message: Message) -> None:
        nonlocal streams
        if message["type"] == "http.response.start":
            streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif streams and not message.get("more_body"):
            message = {**message, "body": message.get("body", b"") + b"data: [DONE]\n\n"}
        await send(message)

    return ending
