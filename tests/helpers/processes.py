"""Servers as processes of their own, that tests kill and start again on the same store."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

FAKE_SERVER = Path(__file__).parent.parent / "faults" / "fake_server.py"
DEADLINE_S = 300.0  # a server that loads on a busy machine takes a minute
ASYNC = {"Prefer": "respond-async"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(
    is_true: Callable[[], Any], what: Callable[[], object] = lambda: "it never happened", seconds: float = DEADLINE_S
) -> Any:
    """Wait until something is true; returns it."""
    deadline_s = time.monotonic() + seconds
    while not (value := is_true()):
        assert time.monotonic() < deadline_s, what()
        time.sleep(0.01)
    return value


class Process:
    """One `codmd-serve` command that may be killed and started again.

    Args:
        folder: for its log; with the fake engine also the engine's memory, see fake_worker.py.
        words: of the command line.
        is_fake: whether its workers have the fake engine.
    """

    def __init__(self, folder: Path, *words: str, is_fake: bool = True, **environment: str) -> None:
        program = [str(FAKE_SERVER)] if is_fake else ["-m", "codmd_serve.cli"]
        self.command = [sys.executable, *program, *words]
        self.folder = folder
        self.log = folder / f"{words[0]}.log"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)

    def kill(self) -> None:
        """As the kernel kills: no time for anything."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def stop(self) -> int:
        """As an operator stops it; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class ServerProcess(Process):
    """A server and a client of it."""

    def __init__(
        self, folder: Path, data: Path, *words: str, is_fake: bool = True, has_page: bool = False, **environment: str
    ) -> None:
        self.port = free_port()
        bundle = ("--bundle", str(folder)) if is_fake else ()
        page = "--page" if has_page else "--no-page"
        common = ("serve", "--port", str(self.port), "--data", str(data), page, "--queue-size", "1000", *bundle)
        super().__init__(folder, *common, *words, is_fake=is_fake, **environment)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=DEADLINE_S, trust_env=False)

    def start(self, is_ready: bool = False) -> None:
        """Start, and wait until it answers, or until it is ready."""
        super().start()
        path = "/ready" if is_ready else "/health"
        until(lambda: not self.is_running() or self.answers(path), self.said)
        assert self.is_running(), self.said()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def answers(self, path: str) -> bool:
        try:
            return self.client.get(path).status_code == 200
        except httpx.TransportError:
            return False

    def submit(self, prompt: str, seed: int = 1, **more: Any) -> str:
        """Have a job accepted; its id."""
        body = {"prompt": prompt, "seed": seed, **more}
        answer = until(lambda: self._submitted(body), self.said)
        job_id: str = answer.json()["id"]
        return job_id

    def _submitted(self, body: dict[str, Any]) -> httpx.Response | None:
        answer = self.client.post("/generate", json=body, headers={**ASYNC, "Cache-Control": "no-cache"})
        if answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready":
            return None
        assert answer.status_code == 202, answer.text
        return answer

    def job(self, job_id: str) -> Any:
        return self.client.get(f"/jobs/{job_id}").json()

    def status_is(self, job_id: str, *statuses: str) -> Any:
        return until(
            lambda: job if (job := self.job(job_id))["status"] in statuses else None,
            lambda: f"{self.job(job_id)}\n{self.said()[-3000:]}",
        )

    def video(self, job_id: str) -> bytes:
        answer = self.client.get(f"/jobs/{job_id}/video")
        assert answer.status_code == 200, answer.text
        return answer.content

    def sha256(self, job_id: str) -> str:
        return hashlib.sha256(self.video(job_id)).hexdigest()

    def worker(self) -> int:
        """Process id of the fake worker that started last."""
        return int((self.folder / "starts").read_text().split("\n")[-2].split()[0])

    def end(self) -> None:
        self.client.close()
        super().end()
