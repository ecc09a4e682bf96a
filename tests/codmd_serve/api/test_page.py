"""What of Gradio is let through: the page's own routes, and only what the page sends."""

import asyncio
import json
from typing import Any

import pytest
from http_tests import refusal
from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from codmd_serve.api.errors import error_response
from codmd_serve.api.page import Page, PageRoutes, judge_join, run_page

JOIN = "/gradio_api/queue/join"
GOOD: dict[str, Any] = {
    "data": ["a prompt", 7],
    "fn_index": 2,
    "session_hash": "abc",
    "trigger_id": 5,
    "event_data": None,
}


async def _page(request: Any) -> Any:
    return JSONResponse({"page": request.url.path, "body": (await request.body()).decode()})


async def _ours(*_: Any) -> Any:
    return error_response(404, "ours")


@pytest.fixture
def state() -> State:
    page_app = Starlette(routes=[Route("/{path:path}", _page, methods=["GET", "POST", "PUT", "DELETE"])])
    state = State()
    state.has_page = True
    state.page = Page(page_app, {2: 2}, lambda: None, lambda: None)
    return state


@pytest.fixture
def client(state: State) -> TestClient:
    ours = Starlette(routes=[Route("/{path:path}", _ours, methods=["GET", "POST", "PUT", "DELETE"])])
    return TestClient(PageRoutes(ours, state))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/config",
        "/theme.css",
        "/favicon.ico",
        "/assets/index-x_1.js",
        "/static/fonts/a.woff2",
        "/svelte/svelte.js",
        "/gradio_api/info",
        "/gradio_api/startup-events",
        "/gradio_api/heartbeat/abc123",
        "/gradio_api/queue/data?session_hash=abc123",
    ],
)
def test_routes_of_the_page_reach_it(client: TestClient, path: str) -> None:
    assert client.get(path).json()["page"] == path.partition("?")[0]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/upload_progress"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=https://evil.example"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/predict"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/login"),
        ("GET", "/token"),
        ("GET", "/monitoring"),
        ("GET", "/assets/../../secret"),
        ("GET", "/gradio_api/heartbeat/a%00b"),
        ("PUT", JOIN),
        ("GET", JOIN),
        ("DELETE", "/"),
        ("GET", "/generate"),
        ("GET", "/nowhere"),
    ],
)
def test_everything_else_is_ours(client: TestClient, method: str, path: str) -> None:
    """S3, S12, S13."""
    refusal(client.request(method, path), 404, "not_found")


def test_what_the_page_sends_reaches_it_whole(client: TestClient) -> None:
    answer = client.post(JOIN, json=GOOD)
    assert json.loads(answer.json()["body"]) == GOOD


@pytest.mark.parametrize(
    "change",
    [
        {"data": ["a", 7, 8]},
        {"data": ["\ud800", 7]},
        {"data": ["a\0b", 7]},
        {"data": ["x" * 5000, 7]},
        {"data": [{"path": "/etc/passwd"}, 7]},
        {"data": [["a"], 7]},
        {"data": [True, 7]},
        {"data": ["a", 10**40]},
        {"data": "ab"},
        {"fn_index": 3},
        {"fn_index": "2"},
        {"fn_index": True},
        {"session_hash": "a b"},
        {"session_hash": None},
        {"session_hash": "a" * 100},
        {"event_data": {"_data": {}}},
        {"trigger_id": "x"},
        {"batched": True},
        {"oauth_token": "x"},
        {"event_id": "x"},
    ],
)
def test_what_the_page_never_sends_is_refused(client: TestClient, change: dict[str, Any]) -> None:
    """S14: nothing of it reaches Gradio, which answers 500 and logs the prompt."""
    body = json.dumps({**GOOD, **change})
    refusal(client.post(JOIN, content=body), 422, "invalid_request")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 60_000, b'{"data": ' + b"9" * 5000 + b"}"])
def test_nonsense_is_refused(client: TestClient, body: bytes) -> None:
    assert judge_join(body, {2: 2}) and client.post(JOIN, content=body).status_code == 422


def test_a_body_without_end_is_refused(client: TestClient) -> None:
    refusal(client.post(JOIN, content=b" " * 100_000), 413, "body_too_large")


@pytest.mark.parametrize("query", ["", "session_hash=a b", "session_hash=abc&x=1", "session_hash=%00"])
def test_a_session_without_a_name_is_refused(client: TestClient, query: str) -> None:
    refusal(client.get(f"/gradio_api/queue/data?{query}"), 422, "invalid_request")


def test_while_the_page_is_built_the_server_runs(state: State, client: TestClient) -> None:
    page, state.page = state.page, None
    answer = client.get("/")
    assert answer.status_code == 503 and "The page is loading" in answer.text and answer.headers["retry-after"] == "1"
    state.page = page
    assert client.get("/").status_code == 200


def test_a_page_is_started_and_kept_until_it_is_cancelled() -> None:
    said: list[str] = []

    async def start() -> None:
        said.append("started")

    async def story() -> None:
        state = State()
        state.page = None
        page = Page(Starlette(), {}, start, lambda: None)
        running = asyncio.create_task(run_page(lambda: page, state))
        async with asyncio.timeout(30):
            while state.page is None:
                await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert state.page is page

    asyncio.run(story())
    assert said == ["started"]


def test_without_a_page_its_paths_are_ours(state: State, client: TestClient) -> None:
    state.has_page = False
    refusal(client.get("/"), 404, "not_found")
