"""uvicorn with our protocol: connections that are only half open come to an end."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

from pesc.serving.http import Protocol


class Impatient(Protocol):
    patience = 0.2


async def app(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(1 if scope["path"] == "/slow" else 0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_headers_have_to_come_and_answers_may_take_their_time() -> None:
    async def talk(port: int, *pieces: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.1)
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        return answer

    async def run() -> list[bytes]:
        config = uvicorn.Config(app, http=Impatient, ws="none", lifespan="off", log_level="error")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port, server = listener.getsockname()[1], uvicorn.Server(config)
            serving = asyncio.create_task(server.serve([listener]))
            request = b"GET /%s HTTP/1.1\r\nHost: x\r\n"
            talks = [talk(port), talk(port, b"GE"), talk(port, request % b"slow" + b"\r\n")]
            talks += [talk(port, request % b"quick" + b"\r\n", request % b"never")]
            answers = await asyncio.gather(*talks)
            server.should_exit = True
            await serving
        return answers

    answers = asyncio.run(run())
    assert [answer.count(b"200 OK") for answer in answers] == [0, 0, 1, 1]
