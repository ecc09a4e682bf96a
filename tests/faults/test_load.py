"""Many clients at once: cancels, disconnects, how soon jobs are accepted, silent connections, ten times the capacity.

Figures of time are recorded, not asserted: this machine may be busy. What is asserted is what may never happen.
"""

import asyncio
import contextlib
import json
import os
import random
import resource
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from polling import pause
from processes import ASYNC, ServerProcess, until
from raw_http import Answer, Connections
from records import percentile, rounds
from storms import all_jobs

Server = Callable[..., ServerProcess]
Record = Callable[..., None]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
NO_CACHE = {**ASYNC, "Cache-Control": "no-cache"}
# A machine that is too busy to answer in time is recorded, not taken for a fault.
NO_ANSWER = (TimeoutError, OSError, asyncio.IncompleteReadError)
FINAL = ("completed", "failed", "cancelled", "expired")


class Gauge:
    """Memory and descriptors of a process over time, sampled by a thread; `progress` is the axis of the slope."""

    def __init__(self, pid: int, progress: Callable[[], int]) -> None:
        self.samples: list[tuple[int, float, int]] = []  # progress, KiB resident, descriptors
        self._pid, self._progress = pid, progress
        self._is_over = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator["Gauge"]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(0.25):
            self.samples.append((self._progress(), resident_kib(self._pid), descriptors(self._pid)))

    def slope_kib_per_1000(self) -> float:
        """Least squares over the second half, when what is kept on purpose is there."""
        last = [(done, kib) for done, kib, _ in self.samples if done >= self.samples[-1][0] / 2]
        if len({done for done, _ in last}) < 2:
            return 0.0
        slope, _ = statistics.linear_regression(*zip(*last, strict=True))
        return 1000.0 * slope


def resident_kib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return float(text.split("VmRSS:")[1].split()[0])


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Crowd:
    """Clients that send jobs, cancel some and leave others; counts what they are answered."""

    def __init__(self, port: int, num_jobs: int, num_disconnects: int) -> None:
        self.port = port
        self.statuses: Counter[int] = Counter()
        self.outcomes: Counter[str] = Counter()
        rng = random.Random(3)
        leaving = set(rng.sample(range(num_jobs), num_disconnects))
        self.plans = [("leave" if number in leaving else rng.choice(PLANS), rng.random()) for number in range(num_jobs)]
        self.num_done = 0

    async def client(self, numbers: range) -> None:
        connections = Connections(self.port, timeout_s=300.0)
        for number in numbers:
            plan, chance = self.plans[number]
            body = {"prompt": f"take {0.01 + 0.02 * chance:.3f} {number}", "seed": number}
            if plan == "leave":
                await self._leave(body, chance)
            else:
                await self._job(connections, body, plan == "cancel", chance)
            self.num_done += 1
        await connections.close()

    async def _leave(self, body: dict[str, Any], chance: float) -> None:
        """Wait for the video, and go away before it is there."""
        content = json.dumps(body).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n")
        writer.write(f"cache-control: no-cache\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
        await pause(0.3 * chance)
        writer.transport.abort()
        self.outcomes["left"] += 1

    async def _job(self, connections: Connections, body: dict[str, Any], is_cancelled: bool, chance: float) -> None:
        answer = await self._ask(connections, "POST", "/generate", body, NO_CACHE)
        while answer.status == 429:
            await asyncio.sleep(0.2)
            answer = await self._ask(connections, "POST", "/generate", body, NO_CACHE)
        path = answer.headers["location"]
        if is_cancelled:
            await pause(0.5 * chance)
            job = (await self._ask(connections, "DELETE", path)).json()
        else:
            job = answer.json()
        while job["status"] not in FINAL:
            await pause(0.5 + chance)
            job = (await self._ask(connections, "GET", path)).json()
        self.outcomes[job["status"]] += 1
        if job["status"] == "completed":
            video = await self._ask(connections, "GET", f"{path}/video")
            assert video.body == b"mp4 " + json.dumps(job["params"]).encode()

    async def _ask(self, connections: Connections, *request: Any) -> Answer:
        answer = await connections.request(*request)
        self.statuses[answer.status] += 1
        return answer


PLANS = ("stay", "stay", "stay", "cancel")


def test_a_crowd_that_cancels_and_leaves(sqlite_server: Server, record: Record) -> None:
    server = sqlite_server("--queue-size", "10000")
    server.start(is_ready=True)
    num_clients, num_jobs = rounds(200), rounds(2000)
    each = num_jobs // num_clients
    num_jobs = each * num_clients

    async def main(crowd: Crowd) -> None:
        own = len(crowd.plans) // num_clients
        await asyncio.gather(*(crowd.client(range(own * n, own * (n + 1))) for n in range(num_clients)))

    # What is kept on purpose grows first: page caches of the store, arenas of malloc. 10,000 jobs in one run: 13.2 MiB
    # over the first 3,000, 4.2 MiB over the other 7,000.
    asyncio.run(main(Crowd(server.port, num_clients * max(1, rounds(4000) // num_clients), 0)))
    quiet = until(lambda: descriptors(server.pid), server.said)
    crowd = Crowd(server.port, num_jobs, num_jobs // 4)
    start_s = time.monotonic()
    with Gauge(server.pid, lambda: crowd.num_done).running() as gauge:
        asyncio.run(main(crowd))
    took_s = time.monotonic() - start_s
    until(lambda: not server.client.get("/health").json()["num_waiting"], server.said)
    until(
        lambda: descriptors(server.pid) <= quiet + 8, lambda: f"{descriptors(server.pid)} descriptors, {quiet} before"
    )
    jobs = all_jobs(server.client)
    assert {job["status"] for job in jobs} <= {"completed", "cancelled"}, Counter(job["status"] for job in jobs)
    assert not [status for status in crowd.statuses if status >= 500], crowd.statuses
    assert "Traceback" not in server.said()
    record(
        clients=num_clients,
        jobs=num_jobs,
        outcomes=dict(crowd.outcomes),
        answers=dict(crowd.statuses),
        took_s=round(took_s, 1),
        memory_slope_kib_per_1000_jobs=round(gauge.slope_kib_per_1000(), 1),
        memory_mib_first_and_last=[round(sample[1] / 1024, 1) for sample in (gauge.samples[0], gauge.samples[-1])],
        descriptors_before_and_after=[quiet, descriptors(server.pid)],
    )
    assert server.stop() == 0


def test_jobs_are_accepted_soon(sqlite_server: Server, record: Record) -> None:
    """50 requests per second, sent when they are due whether or not the ones before are answered."""
    server = sqlite_server("--queue-size", "10000")
    server.start(is_ready=True)
    rate, seconds = 50, max(2, rounds(30))
    took_ms: list[float] = []
    statuses: Counter[int] = Counter()

    async def send(connections: Connections, number: int, due_s: float) -> None:
        body = {"prompt": f"take 0.1 {number}", "seed": number}
        try:
            statuses[(await connections.request("POST", "/generate", body, NO_CACHE)).status] += 1
        except NO_ANSWER:
            statuses[0] += 1
        took_ms.append(1000 * (time.monotonic() - due_s))

    async def main() -> None:
        connections = Connections(server.port, timeout_s=60.0)
        start_s = time.monotonic() + 0.5
        async with asyncio.TaskGroup() as group:
            for number in range(rate * seconds):
                due_s = start_s + number / rate
                await pause(due_s - time.monotonic())
                group.create_task(send(connections, number, due_s))
        await connections.close()

    asyncio.run(main())
    assert set(statuses) <= {0, 202}, statuses
    record(
        requests=len(took_ms),
        unanswered=statuses[0],
        requests_per_s=rate,
        accept_ms_p50=round(percentile(took_ms, 0.5), 1),
        accept_ms_p99=round(percentile(took_ms, 0.99), 1),
        accept_ms_most=round(max(took_ms), 1),
        wanted_accept_ms_p99=50,
    )


def test_silent_connections_do_not_slow_health(sqlite_server: Server, record: Record) -> None:
    server = sqlite_server()
    server.start(is_ready=True)
    num_silent = rounds(1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    halves = (b"", b"GET /health HTTP/1.1\r\nhost: 127.0", b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\n")
    took_ms = []
    with contextlib.ExitStack() as open_ones:
        for number in range(num_silent):
            silent = open_ones.enter_context(socket.create_connection(("127.0.0.1", server.port), 30.0))
            silent.sendall(halves[number % len(halves)])
        until(lambda: descriptors(server.pid) > num_silent, server.said)
        held = descriptors(server.pid)
        with httpx.Client(base_url=server.address, timeout=30.0, trust_env=False) as client:
            for _ in range(100):
                start_s = time.perf_counter()
                assert client.get("/health").status_code == 200
                took_ms.append(1000 * (time.perf_counter() - start_s))
        job = server.status_is(server.submit("good"), "completed")
        assert job["attempts"] == 1
        until(lambda: descriptors(server.pid) < held - num_silent + 10, server.said)  # the header deadline
    record(
        silent_connections=num_silent,
        health_ms_p50=round(percentile(took_ms, 0.5), 1),
        health_ms_p99=round(percentile(took_ms, 0.99), 1),
        health_ms_most=round(max(took_ms), 1),
        wanted_health_ms=100,
    )


def seconds_of(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


class Overload:
    """Requests at a fixed rate for a while, and what becomes of them."""

    def __init__(self, server: ServerProcess, service_s: float) -> None:
        self.server = server
        self.service_s = service_s
        self.statuses: Counter[int] = Counter()
        self.retry_after: list[tuple[float, float]] = []  # when it was said, and what

    async def send(self, connections: Connections, number: int) -> None:
        body = {"prompt": f"take {self.service_s} {number}", "seed": number}
        try:
            answer = await connections.request("POST", "/generate", body, NO_CACHE)
        except NO_ANSWER:
            self.statuses[0] += 1
            return
        self.statuses[answer.status] += 1
        if answer.status == 429:
            self.retry_after.append((time.time(), float(answer.headers["retry-after"])))

    async def run(self, rate: float, seconds: float) -> None:
        connections = Connections(self.server.port, timeout_s=60.0)
        start_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                await pause(start_s + number / rate - time.monotonic())
                group.create_task(self.send(connections, number))
        await connections.close()

    def completed_per_s(self, start_s: float, end_s: float) -> tuple[float, int, list[float]]:
        """Rate of the videos that were finished between two times, how many, and when places became free."""
        jobs = all_jobs(self.server.client)
        ends = sorted(seconds_of(job["finished_at"]) for job in jobs if job["status"] == "completed")
        ends = [each for each in ends if start_s <= each <= end_s]
        begins = sorted(seconds_of(job["started_at"]) for job in jobs if job["started_at"])
        return (len(ends) - 1) / (ends[-1] - ends[0]), len(ends), begins


@pytest.mark.parametrize(("service_s", "num_workers"), [(0.1, 1), (3.0, 2)], ids=["short_jobs", "long_jobs"])
def test_ten_times_the_capacity(sqlite_server: Server, record: Record, service_s: float, num_workers: int) -> None:
    server = sqlite_server("--queue-size", "8", "--workers", str(num_workers), "--no-spare-worker")
    server.start(is_ready=True)
    until(lambda: server.client.get("/health").json()["num_workers"] == num_workers, server.said)
    seconds = max(10.0, rounds(60))
    # Capacity: the queue is never empty and nobody is refused much, for as long.
    calm, storm = Overload(server, service_s), Overload(server, service_s)
    ideal = num_workers / service_s
    start_s = time.time()
    asyncio.run(calm.run(1.1 * ideal, seconds))
    capacity, num_calm, _ = calm.completed_per_s(start_s + 2 * service_s, time.time())
    start_s = time.time()
    asyncio.run(storm.run(10 * ideal, seconds))
    end_s = time.time()
    goodput, num_stormy, begins = storm.completed_per_s(start_s + 2 * service_s, end_s)
    assert set(storm.statuses) <= {0, 202, 429}, storm.statuses
    # Right: a place was free that many seconds later, not much sooner or later.
    waits = [(said, next((b - at for b in begins if b > at), None)) for at, said in storm.retry_after]
    pairs = [(said, real) for said, real in waits if real is not None]
    said_s, real_s = statistics.median(s for s, _ in pairs), statistics.median(r for _, r in pairs)
    record(
        service_s=service_s,
        workers=num_workers,
        each_for_s=seconds,
        requests=storm.statuses.total(),
        accepted=storm.statuses[202],
        refused=storm.statuses[429],
        unanswered=storm.statuses[0],
        capacity_per_s=round(capacity, 3),
        goodput_per_s=round(goodput, 3),
        goodput_share_of_capacity=round(goodput / capacity, 3),
        wanted_goodput_share=0.95,
        videos_in_calm_and_overload=[num_calm, num_stormy],
    )
    if service_s > 1.0:  # the header counts in whole seconds
        wanted = {"wanted_retry_after_factor": 2}
        record(retry_after_s_median=said_s, place_free_after_s_median=round(real_s, 2), **wanted)
    os.kill(server.pid, 15)
