"""What of the page needs no browser: its files, and the endpoint for gradio_client. tests/browser drives the rest."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import gradio as gr
import pytest

from app import demo

FILES = ("page.html", "page.css", *demo.SCRIPTS)
HEADERS = {"host": "videos.example:8000", "x-api-key": "k", "cookie": "c"}


class Server:
    """A server that answers POST /generate in the way it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status, self.content = 200, b"mp4"
        self.asked: list[tuple[str, Any, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.asked.append((self.path, body, dict(self.headers)))
                self.send_response(server.status)
                self.send_header("content-location", "/jobs/j1")
                self.send_header("x-seed", "7")
                self.send_header("content-length", str(len(server.content)))
                self.end_headers()
                self.wfile.write(server.content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def made(self, headers: dict[str, str] | None = None, **asked: Any) -> dict[str, Any]:
        fields = {"prompt": "A red, round circle!", "seed": None, "model": None, **asked}
        return asyncio.run(demo.make_video(self.address, fields, headers or HEADERS))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def test_the_endpoint_answers_the_address_of_the_video_below_the_host_that_was_named(server: Server) -> None:
    made = server.made()
    assert made["url"] == made["path"] == "http://videos.example:8000/jobs/j1/video/a-red-round-circle-7.mp4"
    assert made["is_stream"] and made["meta"] == {"_type": "gradio.FileData"}
    path, body, headers = server.asked[0]
    assert path == "/generate" and body == {"prompt": "A red, round circle!"}, "what is absent is left to the server"
    assert headers["x-api-key"] == "k" and "cookie" not in {name.lower() for name in headers}


def test_behind_a_proxy_with_tls_the_address_has_its_scheme(server: Server) -> None:
    assert server.made({**HEADERS, "x-forwarded-proto": "https"})["url"].startswith("https://videos.example:8000/")


def test_what_is_asked_for_is_sent(server: Server) -> None:
    server.made(seed=2**62, model="base")
    assert server.asked[0][1] == {"prompt": "A red, round circle!", "seed": 2**62, "model": "base"}


def test_a_refusal_is_told_in_the_words_of_the_server(server: Server) -> None:
    server.status, server.content = 422, json.dumps({"error": {"message": "prompt: must not be blank"}}).encode()
    with pytest.raises(gr.Error, match="Prompt: must not be blank"):
        server.made()


@pytest.mark.parametrize("content", [b"<html>Bad gateway</html>", b"[]", b'{"error": null}', b"\xff", b""])
def test_an_answer_that_is_none_of_ours_is_told_as_its_status(server: Server, content: bytes) -> None:
    server.status, server.content = 502, content
    with pytest.raises(gr.Error, match=r"The server answered 502\."):
        server.made()


def test_a_server_that_is_down_is_said_to_be() -> None:
    with pytest.raises(gr.Error, match=r"The server does not answer: ConnectError\."):
        asyncio.run(demo.make_video("http://127.0.0.1:1", {"prompt": "a"}, HEADERS))


def test_the_proxy_of_the_environment_is_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert server.made()["url"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a ring", "a-ring-7.mp4"),
        ("../../etc/passwd", "etc-passwd-7.mp4"),
        ("\u8d64\u3044\u5186", "video-7.mp4"),
        ("x" * 500, "x" * 60 + "-7.mp4"),
    ],
)
def test_a_file_is_named_after_its_prompt_and_cannot_name_a_place(prompt: str, name: str) -> None:
    assert demo.file_name(prompt, "7") == name


def test_the_page_has_one_public_endpoint() -> None:
    async def build() -> Any:
        return demo.build_page("http://127.0.0.1:1").get_config_file()

    # Inside a loop: outside one Gradio makes a loop of its own and never closes it.
    config = asyncio.run(build())
    assert [each["api_name"] for each in config["dependencies"] if each["api_visibility"] == "public"] == ["generate"]
    assert not config["analytics_enabled"] and not config["connect_heartbeat"]


def test_every_part_that_the_script_names_is_in_the_page() -> None:
    html = (demo.FOLDER / "page.html").read_text(encoding="utf-8")
    script = "".join((demo.FOLDER / name).read_text(encoding="utf-8") for name in demo.SCRIPTS)
    ids = re.findall(r'id="([\w-]+)"', html)
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert named and named <= set(ids)
    fields = re.search(r"const FIELDS = \[(.*?)\]", script)
    assert fields is not None
    for name in re.findall(r'"(\w+)"', fields[1]):
        assert {name, f"{name}-error"} <= set(ids), "every field has a place for what is wrong with it"
        assert f"{name}-error" in html.partition(f'id="{name}"')[2].partition(">")[0], "and is described by it"


def test_the_page_loads_nothing_from_elsewhere_and_types_no_model_into_itself() -> None:
    for name in FILES:
        text = (demo.FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|//cdn|@import|\burl\(", text), name
        assert "shapeworld" not in text.lower() and "circle moves" not in text, name
    options = demo.page_options()
    assert options["theme"]._stylesheets == [] and options["run_history"] is False
