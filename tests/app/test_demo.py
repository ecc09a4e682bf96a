"""The page as a client: what it asks the server, what it shows of every kind of answer, and that it stays offline."""

import asyncio
import base64
import html
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from app import demo
from codmd_serve.api.schemas import EXAMPLES as API_EXAMPLES
from distill.worlds.shapeworld.captions import parse_caption

HEADERS = {
    "content-type": "video/mp4",
    "x-seed": "7",
    "server-timing": "queue;dur=0.1, text;dur=10.4, denoise;dur=700.0, decode;dur=200.0, encode;dur=89.5",
}


class Server:
    """A server that gives one answer to whatever it is asked, and remembers what that was."""

    def __init__(self) -> None:
        self.status, self.headers, self.content = 200, dict(HEADERS), b"\x00\x01 the video"
        self.asked: list[tuple[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                server.asked.append((self.path, json.loads(body)))
                self.send_response(server.status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(server.content)))
                self.end_headers()
                self.wfile.write(server.content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def video(self, prompt: str = "a red circle", seed: int | None = 7) -> tuple[str, str]:
        return asyncio.run(demo.request_video(self.address, prompt, seed))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def test_the_video_is_inside_the_page_with_its_times_and_seed(server: Server) -> None:
    screen, times = server.video()
    assert server.asked == [("/generate", {"prompt": "a red circle", "seed": 7})]
    inside = screen.partition("data:video/mp4;base64,")[2].partition('"')[0]
    assert base64.b64decode(inside) == server.content
    assert "autoplay loop muted" in screen
    for words in ("text <b>10 ms</b>", "denoise <b>700 ms</b>", "total <b>1.00 s</b>", "seed <b>7</b>"):
        assert words in times
    assert 'class="note"' not in times


def test_without_a_seed_the_server_draws_one(server: Server) -> None:
    server.video(seed=None)
    assert server.asked == [("/generate", {"prompt": "a red circle"})]


def test_a_refusal_is_shown_in_the_words_of_the_server(server: Server) -> None:
    server.status = 422
    server.content = json.dumps({"error": {"code": "x", "message": "prompt: must not be <blank>"}}).encode()
    screen, times = server.video()
    assert screen == demo.EMPTY_SCREEN
    assert times == '<div class="error">Prompt: must not be &lt;blank&gt;</div>'


@pytest.mark.parametrize("content", [b"<html>Bad gateway</html>", b"[]", b'{"error": null}', b"\xff", b""])
def test_an_answer_that_is_none_of_ours_is_shown_as_its_status(server: Server, content: bytes) -> None:
    server.status, server.content = 502, content
    assert server.video()[1] == '<div class="error">The server answered 502.</div>'


def test_a_server_that_is_down_is_said_to_be() -> None:
    screen, times = asyncio.run(demo.request_video("http://127.0.0.1:1", "a", 1))
    assert screen == demo.EMPTY_SCREEN
    assert "The server at http://127.0.0.1:1 does not answer: ConnectError." in times


def test_the_proxy_of_the_environment_is_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert "<video" in server.video()[0]


def test_warnings_are_shown_as_they_were_written_and_cannot_be_markup() -> None:
    words = "words outside the vocabulary of this model: drag\u00f3n, \U0001f409, <script>, a\\b"
    escaped = words.encode("unicode_escape").decode("ascii")
    times = demo.times_html(httpx.Headers({**HEADERS, "warnings": escaped}))
    assert f'<div class="note">{html.escape(words)}</div>' in times
    cut = demo.times_html(httpx.Headers({**HEADERS, "warnings": "a drag\\U0001f40"}))
    assert '<div class="note">a drag</div>' in cut


def test_an_answer_without_times_is_shown_all_the_same() -> None:
    assert "total <b>0.00 s</b>" in demo.times_html(httpx.Headers())


@pytest.mark.parametrize("example", demo.EXAMPLES)
def test_the_examples_are_captions_of_the_embedded_world(example: str) -> None:
    assert parse_caption(example).objects
    assert example in [each["prompt"] for each in API_EXAMPLES if isinstance(each, dict)]


def test_the_page_has_the_parts_that_the_screenshot_drives() -> None:
    async def build() -> Any:
        return demo.build_page("http://127.0.0.1:1").get_config_file()

    # Inside a loop: outside one Gradio makes a loop of its own and never closes it.
    config = asyncio.run(build())
    parts = {each["props"].get("elem_id"): each["props"] for each in config["components"]}
    assert {"prompt", "seed", "dice", "generate", "screen", "times"} <= set(parts)
    assert parts["prompt"]["value"] == demo.EXAMPLES[0] and parts["seed"]["value"] == demo.DEFAULT_SEED
    assert not config.get("analytics_enabled")


def test_the_looks_load_nothing_from_the_internet() -> None:
    options = demo.page_options()
    assert options["theme"]._stylesheets == []
    assert "http" not in options["css"] and "@import" not in options["css"]
