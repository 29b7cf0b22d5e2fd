"""The guard by itself, in front of a small app that notes what reaches it, as it stands in front of vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from pesc.serving import middleware
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
    limit = 2**16 + 32 * 512
    assert client.post("/x", content=b"x" * limit, headers=HEADERS).text == str(limit)
    # In pieces and without a length, too.
    answer = client.post("/y", content=(b"x" * 1000 for _ in range(limit // 1000 + 1)), headers=HEADERS)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    assert app.paths == ["/x"]


def test_without_a_key_a_web_page_cannot_come_in_by_a_name_of_its_own(
    app: App, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = {"base_url": "http://127.0.0.1:8000"}
    assert TestClient(client.app, **local).get("/x", headers=HEADERS | {"Host": "evil.example"}).status_code == 200
    monkeypatch.delenv("PESC_API_KEY")
    app.paths.clear()
    keyless = TestClient(Guard(app), **local)
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1", "", "localhost@evil.example"):
        for path in ("/v1/models", "/health"):
            answer = keyless.get(path, headers={"Host": host})
            assert (answer.status_code, "is not this machine" in answer.text) == (403, True)
    assert app.paths == []
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000"):
        assert keyless.get("/v1/models", headers={"Host": host}).status_code == 200
    # Who comes from elsewhere has been let in by --host.
    assert TestClient(Guard(app), base_url="http://192.0.2.1").get("/x", headers={"Host": "box"}).status_code == 200


def scope(path: str = "/x") -> Any:
    return {"type": "http", "method": "POST", "path": path, "headers": []}


def test_a_client_that_does_not_send_or_take_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "PATIENCE", 0.05)
    sent: list[Any] = []

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def keep(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def body() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(asyncio.wait_for(Guard(app, context=512)(scope(), never, keep), 5))
    assert sent[0]["status"] == 408
    asyncio.run(asyncio.wait_for(Guard(app, context=512)(scope(), body, never), 5))


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

        await Guard(app, context=512)(scope(), receive, send)

    asyncio.run(talk())
    assert [heard[0]["body"], heard[1], heard[2]["type"], heard[3]] == [b"hi", False, "http.disconnect", True]
