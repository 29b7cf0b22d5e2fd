"""The guard by itself, in front of a small app that notes what reaches it, as it stands in front of vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from pesc.serving.middleware import CLIENT, Guard

KEY = "secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}


class App:
    """Answers with the size of the body that reached it."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        if scope["type"] == "websocket":
            socket = WebSocket(scope, receive, send)
            await socket.accept()
            return await socket.close()
        size = len((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def client(app: App, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """Settings come from the environment, as vLLM builds the guard."""
    monkeypatch.setenv("PESC_API_KEY", KEY)
    monkeypatch.setenv("PESC_CONTEXT", "512")
    return TestClient(Guard(app))


@pytest.mark.parametrize(
    "path", ["/v1/models", "/tokenize", "/invocations", "/metrics", "/", "/health/", "//health", "/HEALTH", "/x/health"]
)
def test_every_route_wants_the_key(client: TestClient, app: App, path: str) -> None:
    for method in ("GET", "POST", "OPTIONS", "PUT", "HEAD"):
        for header in ("", "Bearer", "Bearer other", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer é"):
            answer = client.request(method, path, headers={"Authorization": header.encode()})
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert app.paths == []
        assert client.request(method, path, headers=HEADERS).status_code == 200
        app.paths.clear()


def test_health_and_a_server_without_key_are_for_everyone(
    client: TestClient, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/health").status_code == 200
    monkeypatch.delenv("PESC_API_KEY")
    assert TestClient(Guard(app)).get("/metrics").status_code == 200


def test_a_web_socket_wants_the_key_too(client: TestClient, app: App) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
        pass
    assert app.paths == []
    with client.websocket_connect("/v1/realtime", headers=HEADERS):
        assert app.paths == ["/v1/realtime"]


def test_a_body_beyond_the_limit_does_not_reach_the_engine(client: TestClient, app: App) -> None:
    limit = 2**20 + 32 * 512
    assert client.post("/x", content=b"x" * limit, headers=HEADERS).text == str(limit)
    # In pieces and without a length, too.
    answer = client.post("/y", content=(b"x" * 1000 for _ in range(limit // 1000 + 1)), headers=HEADERS)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    assert app.paths == ["/x"]


def test_the_engine_hears_that_the_client_has_left() -> None:
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.extend([await receive(), CLIENT.get().left.is_set(), await receive(), CLIENT.get().left.is_set()])

    async def talk() -> None:
        messages = [{"type": "http.request", "body": b"hi", "more_body": False}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            await asyncio.sleep(0)
            return messages.pop(0)

        async def send(message: Any) -> None:
            raise AssertionError(message)

        await Guard(app, context=512)({"type": "http", "path": "/x", "headers": []}, receive, send)

    asyncio.run(talk())
    assert [heard[0]["body"], heard[1], heard[2]["type"], heard[3]] == [b"hi", False, "http.disconnect", True]
