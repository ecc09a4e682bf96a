"""SIGKILL of workers, servers and both at random moments under load: no job is lost, doubled or made differently."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from postgres import Postgres
from processes import Process, ServerProcess, until
from records import rounds
from storms import Load, check_all, children, kill, kill_worker, sha256_of_fake

Server = Callable[..., ServerProcess]
Record = Callable[..., None]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(7200)]

# All kills may hit one job, if it is the one that runs: more attempts than kills, so that each of them ends well.
WORDS = ("--max-attempts", "100", "--threads", "1")
FAKE_JOBS = [{"prompt": f"take 0.5 {number}", "seed": number} for number in range(6)]
REAL_JOBS = [
    {"prompt": "a red circle moves right quickly on a black background", "seed": number, "num_frames": 9 + 8 * number}
    for number in range(3)
]


class Engine:
    """What runs the jobs, and the bytes that each must become.

    Attributes:
        pause_s: a kill comes at a random moment within it.
    """

    def __init__(self, is_fake: bool, hashes: dict[Any, str]) -> None:
        self.is_fake = is_fake
        self.bodies = FAKE_JOBS if is_fake else REAL_JOBS
        self.pause_s = 0.6 if is_fake else 1.0
        self._hashes = hashes

    def sha256_of(self, job: Any) -> str:
        return sha256_of_fake(job) if self.is_fake else self._hashes[job["seed"]]


@pytest.fixture(scope="module", params=["fake", "real"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The fake engine, and the embedded student with the bytes of a server that nobody disturbs."""
    if request.param == "fake":
        return Engine(True, {})
    folder = tmp_path_factory.mktemp("undisturbed")
    server = ServerProcess(folder, folder / "data", *WORDS, is_fake=False)
    try:
        server.start()
        jobs = {body["seed"]: server.submit(**body) for body in REAL_JOBS}
        for job_id in jobs.values():
            server.status_is(job_id, "completed")
        hashes = {seed: server.sha256(job_id) for seed, job_id in jobs.items()}
    finally:
        server.end()
    assert len(set(hashes.values())) == len(REAL_JOBS)
    return Engine(False, hashes)


def wait(seconds: float) -> None:
    """Let a random time pass: what is waited for is a moment that nobody chose."""
    moment = time.monotonic() + seconds
    while time.monotonic() < moment:
        time.sleep(0.005)


def storm(
    server: ServerProcess, engine: Engine, num_rounds: int, strike: Callable[[random.Random], None]
) -> tuple[Load, int]:
    """Strike at random moments while jobs are sent; the load, and how many strikes there were."""
    rng = random.Random(7)
    load = Load(server.address, engine.bodies)
    with load.running():
        for number in range(num_rounds):
            # Every third kill may hit a server or worker that only starts.
            if number % 3:
                until(lambda: running(server), server.said)
            wait(rng.uniform(0.0, engine.pause_s))
            strike(rng)
    until(lambda: server.answers("/health"), server.said)
    return load, num_rounds


def running(server: ServerProcess) -> bool:
    """Whether some job runs."""
    try:
        return bool(server.client.get("/jobs", params={"status": "running"}).json().get("jobs"))
    except httpx.TransportError:
        return False


def test_kills_of_the_worker(sqlite_server: Server, engine: Engine, tmp_path: Path, record: Record) -> None:
    server = sqlite_server(*WORDS, "--workers", "2" if engine.is_fake else "1", is_fake=engine.is_fake)
    server.start(is_ready=True)

    def strike(rng: random.Random) -> None:
        until(lambda: kill_worker(server, rng), server.said)

    load, num_kills = storm(server, engine, rounds(50), strike)
    found = check_all(server, load, engine.sha256_of, tmp_path / "data")
    deaths = server.client.get("/health").json()["num_worker_restarts"]
    record(kills=num_kills, worker_restarts=deaths, **found)
    check_empty(server, tmp_path)


def test_kills_of_the_server(sqlite_server: Server, engine: Engine, tmp_path: Path, record: Record) -> None:
    server = sqlite_server(*WORDS, is_fake=engine.is_fake)
    server.start(is_ready=True)

    def strike(_rng: random.Random) -> None:
        server.kill()
        server.start()

    load, num_kills = storm(server, engine, rounds(50), strike)
    record(kills=num_kills, **check_all(server, load, engine.sha256_of, tmp_path / "data"))
    check_empty(server, tmp_path)


def test_kills_of_both_at_once(sqlite_server: Server, engine: Engine, tmp_path: Path, record: Record) -> None:
    server = sqlite_server(*WORDS, is_fake=engine.is_fake)
    server.start(is_ready=True)

    def strike(_rng: random.Random) -> None:
        for pid in [*children(server.pid), server.pid]:
            kill(pid)
        server.kill()
        server.start()

    load, num_kills = storm(server, engine, rounds(20), strike)
    record(kills=num_kills, **check_all(server, load, engine.sha256_of, tmp_path / "data"))
    check_empty(server, tmp_path)


def check_empty(server: ServerProcess, folder: Path) -> None:
    """A server that was told to stop leaves jobs and videos, and nothing else."""
    assert server.stop() == 0
    assert not list((folder / "data" / "spool").iterdir()) and not list((folder / "data" / "dispatchers").iterdir())


@pytest.fixture
def cluster(postgres: Postgres, tmp_path: Path) -> Iterator[tuple[ServerProcess, list[Process]]]:
    """An API alone and two dispatchers, as on machines of their own: only PostgreSQL and the results are common."""
    address, results = postgres.database(), str(tmp_path / "results")
    common = ("--store", address, "--results", results, "--lease-s", "3", *WORDS)
    bundle = tmp_path / "api"
    bundle.mkdir()
    api = ServerProcess(bundle, tmp_path / "api-data", *common, "--workers", "0")
    workers = []
    for number in range(2):
        folder = tmp_path / f"worker{number}"
        folder.mkdir()
        workers.append(Process(folder, "work", "--data", str(folder / "data"), "--bundle", str(bundle), *common))
    try:
        api.start()
        for worker in workers:
            worker.start()
        until(lambda: api.answers("/ready"), workers[0].said)
        yield api, workers
    finally:
        for each in (api, *workers):
            each.end()


def test_kills_of_one_dispatcher_of_two_on_postgresql(
    cluster: tuple[ServerProcess, list[Process]], tmp_path: Path, record: Record
) -> None:
    """Every second time it comes back at once and gives its own jobs back; else its leases run out first."""
    api, workers = cluster
    engine = Engine(True, {})
    numbers = iter(range(10_000))

    def strike(rng: random.Random) -> None:
        number = next(numbers)
        victim = workers[number % 2]
        victim.kill()
        if number % 4 > 1:
            wait(rng.uniform(3.0, 5.0))
        victim.start()

    load, num_kills = storm(api, engine, rounds(20), strike)
    record(kills=num_kills, **check_all(api, load, engine.sha256_of, tmp_path, tmp_path / "results"))
    assert [worker.stop() for worker in workers] == [0, 0]
