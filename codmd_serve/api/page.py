"""Lets the web page's own routes through to Gradio, and nothing else of it: no uploads, no files, no reloads.

Everything that is not the page's goes to our routes, so that an unknown path or a wrong method has our answer, with and
without the page. What reaches Gradio's queue is checked first: it answers nonsense with 500 and logs the prompt.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import State
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codmd_serve.api.errors import error_response

SESSION = r"[A-Za-z0-9-]{1,64}"
GET_ROUTES = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/(static|assets|svelte)/[\w./@+-]{{1,300}}"
    rf"|/gradio_api/(info|startup-events|theme\.css|app_id|heartbeat/{SESSION}|queue/data)"
)
JOIN = "/gradio_api/queue/join"
JOIN_FIELDS = frozenset({"data", "fn_index", "session_hash", "event_data", "trigger_id", "simple_format", "batched"})
MAX_JOIN_BYTES = 65_536
MAX_TEXT_CHARS = 4000
LOADING = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="1"><title>codmd-serve</title>'
    '<body style="font-family:system-ui;margin:20vh auto;max-width:30rem;text-align:center">The page is loading ...'
)


@dataclass(frozen=True, slots=True)
class Page:
    """A built page.

    Attributes:
        app: Gradio's application.
        num_inputs: of each event of the page, by its `fn_index`.
        start: run on the event loop when the application's lifespan has begun.
        close: lets go of open tabs, which a shutdown would wait for otherwise.
    """

    app: Any
    num_inputs: Mapping[int, int]
    start: Callable[[], Any]
    close: Callable[[], None]


async def run_page(load: Callable[[], Page], state: State) -> None:
    """Build the page beside the running server, in a thread, and keep it until cancelled.

    Args:
        load: imports and builds, which takes seconds.
        state: of the application; its `page` is set when it can be served.
    """
    page = await asyncio.to_thread(load)
    async with page.app.router.lifespan_context(page.app):
        await page.start()
        state.page = page
        await asyncio.Event().wait()


class PageRoutes:
    """ASGI middleware between our routes and Gradio's.

    Args:
        app: our routes.
        state: of the application: `page`, and `has_page` where there is or will be one.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.state.has_page or not _is_of_page(scope):
            await self.app(scope, receive, send)
            return
        page: Page | None = self.state.page
        if page is None:
            answer = HTMLResponse(LOADING, 503, {"Retry-After": "1", "Cache-Control": "no-store"})
            await answer(scope, receive, send)
        elif scope["path"] == JOIN:
            await self._join(page, scope, receive, send)
        elif scope["path"].endswith("/queue/data") and not _has_session(scope):
            await error_response(422, "session_hash must be letters and digits")(scope, receive, send)
        else:
            await page.app(scope, receive, send)

    async def _join(self, page: Page, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > MAX_JOIN_BYTES:
                await error_response(413, "this is more than the page sends")(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        problem = judge_join(body, page.num_inputs)
        if problem:
            await error_response(422, problem)(scope, receive, send)
            return
        is_given = False

        async def again() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await page.app(scope, again, send)


def judge_join(body: bytes, num_inputs: Mapping[int, int]) -> str:
    """What is wrong with a request to the page's queue; empty when the page could have sent it."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return "the body is not JSON"
    if not isinstance(said, dict) or said.keys() - JOIN_FIELDS:
        return "the body is nothing that the page sends"
    index, data, session = said.get("fn_index"), said.get("data"), said.get("session_hash")
    if type(index) is not int or index not in num_inputs:
        return "fn_index is of no event of the page"
    if not isinstance(data, list) or len(data) != num_inputs[index] or not all(map(_is_plain, data)):
        return "data is nothing that the page sends"
    if not isinstance(session, str) or re.fullmatch(SESSION, session) is None:
        return "session_hash must be letters and digits"
    trigger = said.get("trigger_id")
    if trigger is not None and type(trigger) is not int:
        return "trigger_id must be a whole number"
    if any(said.get(name) not in (None, False) for name in ("simple_format", "batched")):
        return "the body is nothing that the page sends"
    return "" if said.get("event_data") is None else "event_data is nothing that the page sends"


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        is_text = not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)
        return len(value) <= MAX_TEXT_CHARS and is_text
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) < 2**63
    return value is None


def _is_of_page(scope: Scope) -> bool:
    path = scope["path"]
    if scope["method"] == "POST":
        return bool(path == JOIN)
    return scope["method"] == "GET" and GET_ROUTES.fullmatch(path) is not None and ".." not in path


def _has_session(scope: Scope) -> bool:
    return re.fullmatch(rb"session_hash=[A-Za-z0-9-]{1,64}", scope["query_string"]) is not None
