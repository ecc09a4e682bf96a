"""Load on a server that is being killed: jobs sent once each whatever happens, and what must have become of them."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from processes import ASYNC, Process, ServerProcess

PAUSE_S = 0.02
FINAL_S = 600.0


def video_of(job: Any) -> bytes:
    """What the fake engine makes of a job."""
    return b"mp4 " + json.dumps(job["params"]).encode()


class Load:
    """Threads that keep jobs waiting at a server, which may be away for a while.

    Each job has an Idempotency-Key and is sent until it is answered: so every key is one accepted job.

    Args:
        address: of the server.
        bodies: of the jobs, over and over.
        num_ahead: jobs that are not finished, at most.
    """

    def __init__(self, address: str, bodies: list[dict[str, Any]], num_ahead: int = 16) -> None:
        self.accepted: dict[str, str] = {}  # job id by key
        self.num_unanswered = 0
        self._client = httpx.Client(base_url=address, timeout=30.0, trust_env=False)
        self._bodies = itertools.cycle(bodies)
        self._num_ahead = num_ahead
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator["Load"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            self._thread.join(60.0)
            self._client.close()

    def _run(self) -> None:
        for number in itertools.count():
            body, key = next(self._bodies), f"key-{number}"
            while not self._is_over.is_set() and not self._sent(key, body):
                time.sleep(PAUSE_S)
            while not self._is_over.is_set() and self._num_unfinished() >= self._num_ahead:
                time.sleep(PAUSE_S)
            if self._is_over.is_set():
                return

    def _sent(self, key: str, body: dict[str, Any]) -> bool:
        headers = {**ASYNC, "Cache-Control": "no-cache", "Idempotency-Key": key}
        try:
            answer = self._client.post("/generate", json=body, headers=headers)
        except httpx.TransportError:
            self.num_unanswered += 1
            return False
        if answer.status_code in (200, 202):
            self.accepted[key] = answer.headers["location"].rpartition("/")[2]
            return True
        assert answer.status_code in (429, 503), answer.text
        return False

    def _num_unfinished(self) -> int:
        try:
            health = self._client.get("/health").json()
        except httpx.TransportError:
            return 0
        return int(health["num_waiting"]) + int(health["num_running"])


def all_jobs(client: httpx.Client) -> list[Any]:
    """Every job that the store knows."""
    jobs: list[Any] = []
    page: dict[str, Any] = {"next": ""}
    while page["next"] is not None:
        parameters = {"limit": 100, **({"after": page["next"]} if page["next"] else {})}
        page = client.get("/jobs", params=parameters).json()
        jobs += page["jobs"]
    return jobs


def wait_for_all(server: ServerProcess) -> list[Any]:
    """Wait until no job waits or runs; all of them."""
    deadline_s = time.monotonic() + FINAL_S
    while True:
        left = [server.client.get("/jobs", params={"status": each}).json()["jobs"] for each in ("queued", "running")]
        if not any(left):
            return all_jobs(server.client)
        assert time.monotonic() < deadline_s, f"{left}\n{server.said()[-3000:]}"
        time.sleep(0.1)


def check_all(
    server: ServerProcess, load: Load, sha256_of: Callable[[Any], str], data: Path, results: Path | None = None
) -> dict[str, int]:
    """Every accepted job is completed with the right bytes, none is lost, none is doubled, no file is left."""
    jobs = wait_for_all(server)
    accepted = set(load.accepted.values())
    assert len(accepted) == len(load.accepted), "two keys, one job"
    assert accepted <= {job["id"] for job in jobs}, "a job was lost"
    assert len(jobs) - len(accepted) <= 1, "a job was doubled: only the last key may be unanswered"
    for job in jobs:
        assert job["status"] == "completed", job
        assert server.sha256(job["id"]) == sha256_of(job), f"other bytes: {job}"
    server.client.get("/health")
    files = sorted(path for path in (results or data / "results").rglob("*") if path.is_file())
    leftovers = [path for path in files if path.name.startswith(".")]
    assert not leftovers and len(files) == len(jobs), f"{len(files)} files of {len(jobs)} jobs, {leftovers}"
    return {
        "jobs": len(jobs),
        "completed": len(jobs),
        "lost": len(accepted - {job["id"] for job in jobs}),
        "doubled": len(jobs) - len({job["id"] for job in jobs}),
        "leftover_files": len(files) - len(jobs),
        "unanswered_requests": load.num_unanswered,
        "attempts": sum(job["attempts"] for job in jobs),
    }


def sha256_of_fake(job: Any) -> str:
    return hashlib.sha256(video_of(job)).hexdigest()


def children(pid: int) -> list[int]:
    """Process ids of the workers, and of the spare, of a server."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        paths = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(word) for path in paths for word in path.read_text().split()]
    return []


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_worker(server: Process, rng: random.Random) -> bool:
    """Kill a random child of a server; False when it has none at the moment."""
    assert server.process is not None
    pids = children(server.process.pid)
    if pids:
        kill(rng.choice(pids))
    return bool(pids)
