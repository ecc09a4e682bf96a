"""Slow and silent clients against a real server: deadlines, a bound, and /health that stays quick (S2)."""

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import fake_runner
import pytest
from fake_runner import FACTS, FakeRunner
from http_tests import until

from codmd_serve.api.app import create_app
from codmd_serve.api.backend import Backend, Own
from codmd_serve.api.connections import SPARE_DESCRIPTORS, GuardedProtocol, connection_limit
from codmd_serve.config import ServeConfig
from codmd_serve.serving import Parts, make_dispatcher, make_server


class Running:
    """A server in a thread of the test."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = ServeConfig(data=str(folder), port=self.port, page=False, **settings)
        parts = Parts.open(config)
        own = Own("b", "fake", "e", FACTS)
        dispatcher = make_dispatcher(config, parts, own, asyncio.run(make_runner()))
        self.backend = Backend(config, parts.database, parts.results, parts.hub, own, dispatcher)
        self.server = make_server(create_app(self.backend), self.backend)
        self.server.config.host, self.server.config.port = "127.0.0.1", self.port
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started)

    def connect(self, content: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        client.sendall(content)
        return client

    def ask(self, path: str = "/health") -> tuple[int, float]:
        """Status of a GET and the seconds that it took."""
        start_s = time.perf_counter()
        with self.connect(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()) as client:
            status = int(everything(client).split()[1])
        return status, time.perf_counter() - start_s

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)


async def make_runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def run(**settings: Any) -> Running:
        made.append(Running(tmp_path / str(len(made)), **settings))
        return made[-1]

    yield run
    for each in made:
        each.stop()


def everything(client: socket.socket) -> bytes:
    """What the server sends until it closes."""
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def refusal_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"code", "message", "field"}
    return int(head.split()[1]), error["code"]


@pytest.mark.parametrize("content", [b"", b"GET /health HTTP/1.1\r\nhost: local"])
def test_headers_have_a_deadline(running: Callable[..., Running], content: bytes) -> None:
    server = running(header_timeout_s=1)
    with server.connect(content) as client:
        start_s = time.perf_counter()
        assert refusal_of(everything(client)) == (408, "request_timeout")
        assert time.perf_counter() - start_s < 20


def test_headers_sent_a_byte_at_a_time_have_the_same_deadline(running: Callable[..., Running]) -> None:
    server = running(header_timeout_s=1)
    with server.connect(b"GET /health HTTP/1.1\r\n") as client:
        client.settimeout(0.05)
        start_s = time.perf_counter()
        answer = b""
        while not answer and time.perf_counter() - start_s < 30:
            try:
                client.sendall(b"x")
                answer = client.recv(65536)
            except TimeoutError:
                continue
        assert refusal_of(answer) == (408, "request_timeout")


def test_bodies_have_a_deadline(running: Callable[..., Running]) -> None:
    server = running(body_timeout_s=1)
    head = "POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
    with server.connect(head.encode()) as client:
        assert refusal_of(everything(client)) == (408, "request_timeout")


def test_a_connection_with_a_running_request_is_not_timed_out(running: Callable[..., Running], tmp_path: Path) -> None:
    server = running(header_timeout_s=1)
    gate = tmp_path / "gate"
    body = json.dumps({"prompt": f"wait {gate}"})
    head = "POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with server.connect(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()) as client:
        with server.connect() as silent:  # its deadline began later, and is over first
            everything(silent)
        gate.touch()
        assert everything(client).startswith(b"HTTP/1.1 200 ")


def test_a_kept_alive_connection_gets_a_new_deadline(running: Callable[..., Running]) -> None:
    server = running(header_timeout_s=2)
    client = HTTPConnection("127.0.0.1", server.port, timeout=30)
    for _ in range(3):
        client.request("GET", "/health")
        answer = client.getresponse()
        assert answer.status == 200 and answer.read()
    client.close()


def test_a_thousand_silent_clients_do_not_make_health_slow(running: Callable[..., Running]) -> None:
    if connection_limit(1000) < 1000:
        pytest.skip("this system allows no thousand connections: the hard limit of descriptors is too low")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    server = running(header_timeout_s=60)
    clients = [server.connect(b"GET /health HTTP/1.1\r\n") for _ in range(1000)]
    try:
        asked = [server.ask() for _ in range(5)]
        assert {status for status, _ in asked} == {200}
        assert sorted(seconds for _, seconds in asked)[2] < 1.0
    finally:
        for client in clients:
            client.close()


def test_the_longest_silent_connection_makes_room(
    running: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    server = running(max_connections=16, header_timeout_s=60)
    clients = [server.connect(b"GET") for _ in range(100)]
    try:
        assert server.ask()[0] == 200
        until(lambda: len(server.server.server_state.connections) <= 16)
        clients[0].settimeout(30)
        with suppress(ConnectionResetError):
            assert everything(clients[0]) == b"", "closed, one way or the other"
    finally:
        for client in clients:
            client.close()
    lines = [each for each in caplog.records if "idle ones are closed" in each.getMessage()]
    assert len(lines) <= 1, "said once, not for each"


def big_videos(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let videos have more bytes than the system buffers; returns how many."""
    num_bytes = 32 * 2**20
    monkeypatch.setattr(fake_runner, "video_of", lambda params: bytes(num_bytes))
    return num_bytes


def ask_for_video(server: Running) -> socket.socket:
    """A client that has asked for a video, and reads nothing yet."""
    body = json.dumps({"prompt": "a"})
    head = "POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return server.connect(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())


def test_a_client_that_reads_nothing_is_cut_off(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_bytes = big_videos(monkeypatch)
    monkeypatch.setattr(GuardedProtocol, "send_timeout_s", 1.0)
    server = running()
    with ask_for_video(server) as client:
        until(lambda: server.server.server_state.connections)
        until(lambda: not server.server.server_state.connections)
        until(lambda: not server.server.server_state.tasks)
        got = 0
        with suppress(ConnectionResetError):
            while part := client.recv(2**20):
                got += len(part)
        assert got < num_bytes
    assert server.ask()[0] == 200
    assert not [each for each in caplog.records if each.levelname in ("ERROR", "CRITICAL")], "no traceback"


def test_a_client_that_pauses_for_less_gets_it_all(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = big_videos(monkeypatch)
    monkeypatch.setattr(GuardedProtocol, "send_timeout_s", 20.0)
    server = running()
    paused: list[Any] = []
    pause = GuardedProtocol.pause_writing
    monkeypatch.setattr(GuardedProtocol, "pause_writing", lambda self: (paused.append(self), pause(self))[1])
    with ask_for_video(server) as client:
        until(lambda: paused)
        answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 200 ") and len(answer.partition(b"\r\n\r\n")[2]) == num_bytes


def test_what_is_no_http_is_told_so(running: Callable[..., Running]) -> None:
    server = running()
    with server.connect(b"\x16\x03\x01 hello\r\n\r\n") as client:
        assert refusal_of(everything(client)) == (400, "bad_request")


def test_the_limit_leaves_descriptors_for_the_rest() -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = connection_limit(10**9)
    assert limit == max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    assert connection_limit(20) == 20
