"""Bad input at a server with the page mounted: no 5xx, no hang, no file; and clients that do not keep their side."""

import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from malformed import bad_bodies, bad_heads, bad_paths
from processes import ASYNC, ServerProcess, until
from records import rounds

Server = Callable[..., ServerProcess]
Record = Callable[..., None]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
NUM_AT_ONCE = 16
HANG_S = 60.0


@pytest.fixture
def paged(sqlite_server: Server, tmp_path: Path) -> Iterator[ServerProcess]:
    """A ready server with the page, whose temporary files go to a folder of the test."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    words = ("--queue-size", "10000", "--header-timeout-s", "5", "--body-timeout-s", "5")
    server = sqlite_server(*words, has_page=True, TMPDIR=str(temporary))
    server.start(is_ready=True)
    until(lambda: server.client.get("/").status_code == 200, server.said)
    yield server
    assert "Traceback" not in server.said(), server.said()[-5000:]
    assert server.client.get("/health").status_code == 200
    assert not list(temporary.iterdir())
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file() and is_foreign(path)] == []


def is_foreign(path: Path) -> bool:
    """Whether a file is none of the store, the locks and the results."""
    return not {"results", "dispatchers", "events-jobs.sqlite3"} & set(path.parts) and "jobs.sqlite3" not in path.name


async def exchange(port: int, message: bytes) -> int:
    """Send bytes and no more; the status of the answer, 0 when the connection was closed without one."""
    async with asyncio.timeout(HANG_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(message)
            line = await reader.readline()
            match = re.match(rb"HTTP/1\.1 (\d{3}) ", line)
            return int(match[1]) if match else 0
        except ConnectionResetError:
            return 0
        finally:
            writer.close()


def send_all(port: int, messages: Iterator[bytes]) -> Counter[int]:
    """Send them all, some at a time; how often each status came."""
    found: Counter[int] = Counter()

    async def client() -> None:
        for message in messages:
            status = await exchange(port, message)
            found[status] += 1
            assert status < 500, message[:500]

    async def main() -> None:
        await asyncio.gather(*(client() for _ in range(NUM_AT_ONCE)))

    asyncio.run(main())
    return found


@pytest.mark.parametrize(
    ("make", "full"),
    [(bad_bodies, 4000), (bad_heads, 3000), (bad_paths, 3000)],
    ids=["bodies", "headers", "paths"],
)
def test_malformed_requests(
    paged: ServerProcess, record: Record, make: Callable[[random.Random, int], Iterator[bytes]], full: int
) -> None:
    start_s = time.monotonic()
    found = send_all(paged.port, make(random.Random(11), rounds(full)))
    took_s = round(time.monotonic() - start_s, 1)
    record(requests=found.total(), statuses={str(status): found[status] for status in sorted(found)})
    record(took_s=took_s, server_errors=0, hangs=0, files=0)
    job = paged.status_is(paged.submit("good"), "completed")
    assert job["attempts"] == 1


def test_schemathesis(paged: ServerProcess, record: Record, tmp_path: Path) -> None:
    """Requests made from the live schema, right and wrong ones."""
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance"
    words = ["run", f"{paged.address}/openapi.json", "--checks", checks, "--max-examples", str(rounds(100))]
    words += ["--request-timeout", "60", "--seed", "1", "--continue-on-failure", "--no-color", "--no-shrink"]
    words += ["--phases", "examples,coverage,fuzzing,stateful", "--suppress-health-check", "all", "--workers", "2"]
    program = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run([program, *words], capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
    (tmp_path / "schemathesis.log").write_text(done.stdout)
    counted = re.search(r"(\d+) generated", done.stdout)
    record(requests=int(counted[1]) if counted else 0, exit_status=done.returncode, checks=checks.split(","))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_client_that_sends_half_a_body(sqlite_server: Server, record: Record) -> None:
    server = sqlite_server("--body-timeout-s", "2")
    server.start(is_ready=True)
    head = (
        b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    )

    async def main() -> list[int]:
        return await asyncio.gather(*(exchange(server.port, head + b'{"prompt": ') for _ in range(50)))

    start_s = time.monotonic()
    statuses = Counter(asyncio.run(main()))
    record(clients=50, statuses={str(each): statuses[each] for each in statuses})
    record(body_timeout_s=2, took_s=round(time.monotonic() - start_s, 1))
    assert statuses == {408: 50}
    assert server.client.get("/jobs").json()["jobs"] == []
    server.status_is(server.submit("good"), "completed")


def test_a_client_that_stops_reading(sqlite_server: Server, record: Record) -> None:
    """20 clients ask for 64 MiB each and read nothing: others are served, and these are cut off."""
    server = sqlite_server()
    server.start(is_ready=True)
    job_id = server.submit("big 64")
    server.status_is(job_id, "completed")
    num_clients = 20
    start_s = time.monotonic()
    before_kib = resident_kib(server.pid)
    clients = [socket.create_connection(("127.0.0.1", server.port), 30.0) for _ in range(num_clients)]
    try:
        for client in clients:
            client.sendall(f"GET /jobs/{job_id}/video HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
        for number in range(5):
            server.status_is(server.submit(f"good {number}"), "completed")
        most_kib = resident_kib(server.pid)
        until(lambda: cut_off(server) >= num_clients, server.said, seconds=180.0)
        cut_s = round(time.monotonic() - start_s, 1)
    finally:
        for client in clients:
            client.close()
    record(clients=num_clients, cut_off_after_s=cut_s, memory_growth_mib=round((most_kib - before_kib) / 1024, 1))
    assert most_kib - before_kib < 20 * 4 * 1024, "a chunk or two of each, not 64 MiB"
    assert server.video(job_id).startswith(b"mp4 ")


def cut_off(server: ServerProcess) -> int:
    return server.said().count("read nothing for")


def resident_kib(pid: int) -> float:
    return float(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def test_a_key_that_is_used_with_another_body(sqlite_server: Server, record: Record) -> None:
    server = sqlite_server()
    server.start(is_ready=True)

    def send(body: dict[str, Any]) -> tuple[int, str]:
        headers = {**ASYNC, "Idempotency-Key": "one"}
        answer = server.client.post("/generate", json=body, headers=headers)
        content = answer.json()
        return answer.status_code, content["error"]["code"] if content["error"] else content["id"]

    first = send({"prompt": "a", "seed": 1})
    same, other = send({"seed": 1, "prompt": "a"}), send({"prompt": "b", "seed": 1})
    assert same == first and other == (409, "idempotency_conflict")
    assert len(server.client.get("/jobs").json()["jobs"]) == 1
    record(first=first[0], same_body=same[0], other_body=other[0], jobs=1)
    server.kill()
    server.start(is_ready=True)
    assert send({"prompt": "b", "seed": 1}) == (409, "idempotency_conflict"), "also after a crash"
    assert json.loads(server.client.get(f"/jobs/{first[1]}").text)["seed"] == 1
