"""The page as a client: what it asks the server, what it shows of every kind of answer, and that it stays offline."""

import asyncio
import html
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from app import demo
from codmd_serve.api.schemas import EXAMPLES as API_EXAMPLES
from distill.worlds.shapeworld.captions import parse_caption

JOB: dict[str, Any] = {
    "id": "j1",
    "status": "queued",
    "progress": 0.0,
    "stage": "",
    "position": 0,
    "seed": 7,
    "timings_ms": {"queue": 0.1, "text": 10.4, "denoise": 700.0, "decode": 200.0, "encode": 89.5},
    "warnings": [],
    "error": None,
}


class Server:
    """A server that tells a job's story, one state at each look, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status = 202
        self.content: bytes | None = None
        self.states: list[dict[str, Any]] = [
            {"status": "queued", "position": 2},
            {"status": "running", "stage": "denoise", "progress": 0.375},
            {"status": "completed", "progress": 1.0},
        ]
        self.asked: list[tuple[str, str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                server.asked.append(("POST", self.path, json.loads(body)))
                assert self.headers["prefer"] == "respond-async"
                content = json.dumps(JOB).encode() if server.content is None else server.content
                self.answer(server.status, content)

            def do_GET(self) -> None:
                server.asked.append(("GET", self.path, self.headers["authorization"]))
                state = server.states.pop(0) if len(server.states) > 1 else server.states[0]
                self.answer(state.get("http", 200), json.dumps({**JOB, **state}).encode())

            def do_DELETE(self) -> None:
                server.asked.append(("DELETE", self.path, self.headers["authorization"]))
                self.answer(200, b"{}")

            def answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def shown(self, prompt: str = "a red circle", seed: int | None = 7, **more: Any) -> list[tuple[str, str]]:
        async def all_of_it() -> list[tuple[str, str]]:
            return [each async for each in demo.follow_video(self.address, prompt, seed, **more)]

        return asyncio.run(all_of_it())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(demo, "POLL_S", 0.001)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def test_a_video_is_followed_and_shown_by_its_url_with_times_and_seed(server: Server) -> None:
    *waits, (screen, times) = server.shown()
    assert server.asked[0] == ("POST", "/generate", {"prompt": "a red circle", "seed": 7})
    assert {path for _, path, _ in server.asked[1:]} == {"/jobs/j1"}
    assert [text.partition(">")[2].partition("<")[0] for text, _ in waits] == [
        "waiting",
        "waiting, 2 before it",
        "denoise, 38 %",
    ]
    assert 'src="jobs/j1/video"' in screen and "autoplay loop muted" in screen
    for words in ("text <b>10 ms</b>", "denoise <b>700 ms</b>", "total <b>1.00 s</b>", "seed <b>7</b>"):
        assert words in times
    assert 'class="note"' not in times


def test_without_a_seed_the_server_draws_one(server: Server) -> None:
    server.shown(seed=None)
    assert server.asked[0] == ("POST", "/generate", {"prompt": "a red circle"})


def test_a_refusal_is_shown_in_the_words_of_the_server(server: Server) -> None:
    server.status = 422
    server.content = json.dumps({"error": {"code": "x", "message": "prompt: must not be <blank>"}}).encode()
    (shown,) = server.shown()
    assert shown == (demo.EMPTY_SCREEN, '<div class="error">Prompt: must not be &lt;blank&gt;</div>')


@pytest.mark.parametrize("content", [b"<html>Bad gateway</html>", b"[]", b'{"error": null}', b"\xff", b""])
def test_an_answer_that_is_none_of_ours_is_shown_as_its_status(server: Server, content: bytes) -> None:
    server.status, server.content = 502, content
    assert server.shown()[-1][1] == '<div class="error">The server answered 502.</div>'


def test_a_job_that_fails_tells_why(server: Server) -> None:
    server.states = [{"status": "failed", "error": {"code": "out_of_memory", "message": "out of <memory>"}}]
    assert server.shown()[-1] == (demo.EMPTY_SCREEN, '<div class="error">Out of &lt;memory&gt;</div>')
    server.states = [{"status": "cancelled", "error": None}]
    assert "The job is cancelled" in server.shown()[-1][1]
    server.states = [{"http": 404}]
    assert "The server answered 404." in server.shown()[-1][1]


def test_a_server_that_is_down_is_said_to_be() -> None:
    async def first() -> tuple[str, str]:
        return await anext(demo.follow_video("http://127.0.0.1:1", "a", 1))

    screen, times = asyncio.run(first())
    assert screen == demo.EMPTY_SCREEN
    assert "The server at http://127.0.0.1:1 does not answer: ConnectError." in times


def test_the_proxy_of_the_environment_is_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert "<video" in server.shown()[-1][0]


def test_the_key_of_the_reader_goes_along(server: Server) -> None:
    server.shown(keys={"authorization": "Basic x"})
    assert {key for method, _, key in server.asked if method == "GET"} == {"Basic x"}


def test_a_closed_tab_cancels_its_jobs_and_no_others(server: Server) -> None:
    async def story() -> None:
        jobs = demo.SessionJobs(server.address)
        jobs.add("closed", "j1", {"authorization": "k"})
        jobs.add("open", "j2", {})
        await jobs.cancel("closed")
        await jobs.cancel("closed")
        await jobs.cancel("unknown")

    asyncio.run(story())
    assert server.asked == [("DELETE", "/jobs/j1", "k")]


def test_a_finished_job_is_not_cancelled_later(server: Server) -> None:
    jobs = demo.SessionJobs(server.address)
    server.shown(jobs=jobs, session="s")
    asyncio.run(jobs.cancel("s"))
    assert not [each for each in server.asked if each[0] == "DELETE"]


def test_warnings_are_shown_as_they_were_written_and_cannot_be_markup() -> None:
    words = "words outside the vocabulary of this model: drag\u00f3n, \U0001f409, <script>, a\\b"
    assert f'<div class="note">{html.escape(words)}</div>' in demo.times_html({**JOB, "warnings": [words]})


def test_an_answer_without_times_is_shown_all_the_same() -> None:
    assert "total <b>0.00 s</b>" in demo.times_html({**JOB, "timings_ms": {}})


@pytest.mark.parametrize("example", demo.EXAMPLE_PROMPTS)
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
    assert parts["prompt"]["value"] == demo.EXAMPLE_PROMPTS[0] and parts["seed"]["value"] == demo.DEFAULT_SEED
    assert not config.get("analytics_enabled")


def test_the_looks_load_nothing_from_the_internet() -> None:
    options = demo.page_options()
    assert options["theme"]._stylesheets == []
    assert "http" not in options["css"] and "@import" not in options["css"]
