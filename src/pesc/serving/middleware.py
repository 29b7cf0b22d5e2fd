"""Around the server's app: errors in OpenAI's form, the API key, and limits on what clients may cost."""

from __future__ import annotations

import asyncio
import hmac
from contextlib import suppress
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def answer_errors(app: FastAPI) -> None:
    """Make an app answer every error in OpenAI's form."""

    async def refused(_: Request, error: Any) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    async def unreadable(_: Request, error: Any) -> JSONResponse:
        return error_response(400, describe(error.errors()))

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, str(error))

    app.add_exception_handler(AnyHTTPException, refused)
    app.add_exception_handler(RequestValidationError, unreadable)
    app.add_exception_handler(Exception, failed)


def describe(errors: Any) -> str:
    """One line of what pydantic found wrong, with the names of the fields."""
    return "; ".join(f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}" for error in errors)


def error_response(status: int, message: str, code: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


class RequireKey:
    """Lets in only requests with the key; /health is for everyone."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._knows(scope):
            return await self.app(scope, receive, send)
        answer = error_response(401, "send the server's API key: Authorization: Bearer KEY", "invalid_api_key")
        answer.headers["WWW-Authenticate"] = "Bearer"
        await answer(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key)


class Guard:
    """Refuses bodies beyond any prompt that fits, and cancels the work for a client that has left."""

    def __init__(self, app: ASGIApp, context: int) -> None:
        self.app = app
        # Far more than tokens need, escapes and tools included: beyond it, even tokenizing could eat the memory.
        self.limit = 2**20 + 32 * context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        messages: asyncio.Queue[Message] = asyncio.Queue()

        async def watch() -> None:
            size = 0
            while (message := await receive())["type"] == "http.request":
                size += len(message.get("body", b""))
                if size <= self.limit:
                    messages.put_nowait(message)
                elif not message.get("more_body"):
                    # Only now: a client that is still sending would not see the answer.
                    too_large = error_response(413, f"the request has {size} bytes; at most {self.limit} fit")
                    await too_large(scope, receive, send)
                    break
            work.cancel_scope.cancel()

        with suppress(asyncio.CancelledError):  # when the server stops; uvicorn would log it as a failure
            async with anyio.create_task_group() as work:
                work.start_soon(watch)
                await self.app(scope, messages.get, send)
                work.cancel_scope.cancel()
