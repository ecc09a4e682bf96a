"""The whole thing as a user starts it: one `codmd-serve` process with its page, its worker, and a tiny real bundle."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from codmd_serve import cli

PROMPT = "a red circle moves right quickly on a black background"
DEADLINE_S = 300.0  # for a machine that has little to spare; it takes a few seconds


class Running:
    """A server process and a client of it."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = folder / "server.log"
        self.out = folder / "server.out"
        spool = folder / "spool"
        spool.mkdir()
        # S5: gradio's default place is taken by somebody else, and nothing can be written below it, not even as root.
        self.foreign = spool / "gradio"
        self.foreign.write_text("of another user")
        self.spool = spool
        command = [sys.executable, "-m", "codmd_serve.cli", "--bundle", str(bundle), "--port", str(self.port)]
        self.data = folder / "data"
        environment = {
            **os.environ,
            "TMPDIR": str(spool),
            "CODMD_DRAIN_TIMEOUT_S": "120",
            "CODMD_DATA": str(self.data),
            "CODMD_SPARE_WORKER": "0",
        }
        with self.log.open("wb") as log, self.out.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=log, env=environment)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=DEADLINE_S, trust_env=False)

    def until(self, is_true: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not is_true():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.02)

    def is_ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.ConnectError:
            return False

    def worker(self) -> int:
        """Process id of the worker: the one child of the server that runs it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [pid for pid in children if b"codmd_serve.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return int(pid)

    def generate(self, **body: Any) -> httpx.Response:
        # Made, not found in the store.
        return self.client.post("/generate", json={"prompt": PROMPT, **body}, headers={"Cache-Control": "no-cache"})

    def end(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tiny_bundle, tmp_path_factory.mktemp("server"))
    try:
        running.until(running.is_ready)
        yield running
    finally:
        running.end()


def test_one_line_says_that_the_server_is_ready(server: Running) -> None:
    (line,) = server.out.read_text().splitlines()
    assert line.startswith(f"ready: http://127.0.0.1:{server.port} model=tiny-codmd device=cpu dtype=float32 ")
    assert "attention=native execution=eager seconds_to_ready=" in line


def test_generate_answers_the_video_that_the_command_line_makes(
    server: Running, tiny_bundle: Path, tmp_path: Path, read_video: Callable[[bytes], Any]
) -> None:
    answer = server.generate(seed=7)
    assert answer.status_code == 200 and answer.headers["x-seed"] == "7"
    assert "warnings" not in answer.headers
    frames, fps, _ = read_video(answer.content)
    assert frames.shape == (9, 32, 32, 3) and fps == 16
    stages = [stage.partition(";")[0] for stage in answer.headers["server-timing"].split(", ")]
    assert stages == ["queue", "text", "denoise", "decode", "encode"]

    output = tmp_path / "a.mp4"
    assert cli.main(["generate", PROMPT, "-o", str(output), "--seed", "7", "--bundle", str(tiny_bundle)]) == 0
    assert output.read_bytes() == answer.content


def test_unknown_words_are_made_and_told(server: Running) -> None:
    answer = server.client.post("/generate", json={"prompt": "a red drag\u00f3n", "seed": 1})
    assert answer.status_code == 200
    expected = "words outside the vocabulary of this model: drag\\xf3n; It knows a few words only."
    assert answer.headers["warnings"] == expected


def test_the_page_is_at_the_root_and_a_program_makes_a_video_by_it(server: Running, tmp_path: Path) -> None:
    """docs/serving.md shows this to users of gradio_client."""
    server.until(lambda: server.client.get("/").status_code == 200)
    page = server.client.get("/")
    assert page.status_code == 200 and "codmd-serve" in page.text
    client = Client(f"http://127.0.0.1:{server.port}", verbose=False, analytics_enabled=False, download_files=tmp_path)
    try:
        video = Path(client.predict(PROMPT, 7, api_name="/generate"))
        assert video.name == "a-red-circle-moves-right-quickly-on-a-black-background-7.mp4"
        assert video.read_bytes() == server.generate(seed=7).content
        with pytest.raises(AppError, match="Prompt: must not be blank"):
            client.predict("  ", 7, api_name="/generate")
        with pytest.raises(AppError, match="Model must be one of tiny-codmd, got 'no such'"):
            client.predict(PROMPT, 7, "no such", api_name="/generate")
    finally:
        client.close()
    assert "Traceback" not in server.log.read_text()


def test_s5_the_page_keeps_its_files_in_a_folder_of_our_own(server: Running) -> None:
    server.until(lambda: server.client.get("/").status_code == 200)
    assert server.foreign.read_text() == "of another user"
    assert (server.data / "page").is_dir()


def test_a_killed_worker_leaves_the_server_up_and_the_next_request_works(server: Running) -> None:
    before = server.generate(seed=7)
    os.kill(server.worker(), signal.SIGKILL)
    # At once: it waits for the next worker.
    after = server.generate(seed=7)
    assert after.status_code == 200 and after.content == before.content
    health = server.client.get("/health").json()
    assert health["num_worker_restarts"] >= 1 and health["is_ready"]
    assert len(server.out.read_text().splitlines()) == 1, "ready is said once"


def test_sigterm_ends_it_soon_with_a_page_open_and_leaves_nothing(server: Running) -> None:
    """The last test of this server."""
    worker = server.worker()
    with server.client.stream("GET", "/gradio_api/heartbeat/opentab") as tab:
        assert next(tab.iter_lines()).startswith("data: ALIVE")
        start_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE_S) == 0
        # An open tab would hold it for the whole drain timeout, 120 s here.
        assert time.monotonic() - start_s < 60
    assert not Path(f"/proc/{worker}").exists()
    assert list(server.spool.iterdir()) == [server.foreign]
    assert not list((server.data / "spool").iterdir()) and not list((server.data / "dispatchers").iterdir())
    assert "Traceback" not in server.log.read_text()
