"""One fault after the other: the job says its code or goes on, and the next good request succeeds."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import imageio_ffmpeg
import pytest
from disks import small_disk_at
from postgres import Postgres
from processes import ServerProcess, until
from storms import Load, check_all, children, sha256_of_fake, video_of

Server = Callable[..., ServerProcess]
Record = Callable[..., None]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

ORDERS = {
    "out of memory": ("oom", "out_of_memory", 1),
    "killed for want of memory": ("die", "worker_died", 2),
    "segmentation fault": ("segfault", "worker_died", 2),
    "poisoned CUDA context": ("device", "device_error", 2),
    "hang": ("deaf /dev/null/never", "worker_hung", 2),
    "stopped worker": ("stop", "worker_hung", 2),
    "unexpected exception": ("bug", "internal_error", 1),
}
REAL = {"prompt": "a red circle moves right quickly on a black background", "num_frames": 9}


def good(server: ServerProcess) -> float:
    """Send a good request; the seconds until its video is there."""
    start_s = time.monotonic()
    job = server.status_is(server.submit("good"), "completed")
    assert server.video(job["id"]) == video_of(job)
    return round(time.monotonic() - start_s, 1)


@pytest.mark.parametrize("fault", list(ORDERS))
def test_a_fault_of_the_engine(sqlite_server: Server, record: Record, fault: str, tmp_path: Path) -> None:
    order, code, attempts = ORDERS[fault]
    server = sqlite_server("--stall-timeout-s", "2")
    (server.folder / "service_s").write_text("0.2")
    server.start(is_ready=True)
    start_s = time.monotonic()
    job_id, behind = server.submit(order), server.submit("behind it")
    job = server.status_is(job_id, "failed")
    took_s = round(time.monotonic() - start_s, 1)
    assert (job["error"]["code"], job["attempts"]) == (code, attempts), job
    assert server.status_is(behind, "completed")["attempts"] == 1
    record(fault=fault, code=code, attempts=attempts, until_failed_s=took_s, next_good_s=good(server))
    assert server.stop() == 0
    assert not list((tmp_path / "data" / "spool").iterdir())


def test_an_idle_worker_that_is_stopped(sqlite_server: Server, record: Record) -> None:
    """kill -STOP from outside: nothing is in flight that could be seen to stall."""
    server = sqlite_server()
    server.start(is_ready=True)
    os.kill(server.worker(), signal.SIGSTOP)
    record(fault="kill -STOP of an idle worker", code="", next_good_s=good(server))
    assert server.client.get("/health").json()["num_worker_restarts"] == 1


@pytest.fixture
def ffmpeg(tmp_path: Path) -> Path:
    """A program that encodes as ffmpeg does, but never ends while the file `hang` lies beside it."""
    program = tmp_path / "ffmpeg"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *-encoders*) ;; *) [ -e {tmp_path}/hang ] && exec sleep 100000;; esac\n'
        f'exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n'
    )
    program.chmod(0o755)
    return program


def test_an_encoder_that_never_ends(sqlite_server: Server, record: Record, tmp_path: Path, ffmpeg: Path) -> None:
    server = sqlite_server("--threads", "1", is_fake=False, IMAGEIO_FFMPEG_EXE=str(ffmpeg))
    server.start(is_ready=True)
    (tmp_path / "hang").touch()
    start_s = time.monotonic()
    job_id = server.submit(**REAL)
    wait_s = 300.0
    job: Any = {}
    while job.get("status") != "failed":
        job = server.job(job_id)
        assert time.monotonic() < start_s + wait_s, server.said()
        time.sleep(0.2)
    took_s = round(time.monotonic() - start_s, 1)
    assert (job["error"]["code"], job["attempts"]) == ("encoder_hung", 2)
    (tmp_path / "hang").unlink()
    start_s = time.monotonic()
    server.status_is(server.submit(**REAL), "completed")
    next_s = round(time.monotonic() - start_s, 1)
    record(fault="encoder that never ends", code="encoder_hung", attempts=2, until_failed_s=took_s, next_good_s=next_s)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    with small_disk_at(tmp_path / "small", "2m") as folder:
        yield folder


@pytest.mark.parametrize("place", ["results", "everything"])
def test_a_full_disk(sqlite_server: Server, record: Record, small_disk: Path, place: str) -> None:
    """The videos' disk, and the one that also holds the spool; the store is elsewhere and keeps the queue."""
    words = ("--results", str(small_disk / "results"))
    if place == "everything":
        words = (*words, "--data", str(small_disk / "data"))
    server = sqlite_server(*words, "--threads", "1", is_fake=False)
    server.start(is_ready=True)
    server.status_is(server.submit(**REAL), "completed")
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    answer = server.client.post("/generate", json={**REAL, "seed": 5}, headers={"Cache-Control": "no-cache"})
    assert answer.status_code == 507 and answer.json()["error"]["code"] == "storage_full", answer.text
    refused = server.client.post("/generate", json={**REAL, "seed": 6})
    assert refused.status_code == 507 and int(refused.headers["retry-after"]) > 0
    assert server.client.get("/ready").status_code == 503
    ballast.unlink()
    until(lambda: server.answers("/ready"), server.said)
    start_s = time.monotonic()
    server.status_is(server.submit(**REAL), "completed")
    next_s = round(time.monotonic() - start_s, 1)
    record(fault=f"full disk: {place}", code="storage_full", answers=[507, 507], next_good_s=next_s)


def test_folders_that_vanish(sqlite_server: Server, record: Record, tmp_path: Path) -> None:
    """Spool and results are removed again and again while jobs run, as cleaners of temporary files do."""
    server = sqlite_server("--threads", "1", is_fake=False)
    server.start(is_ready=True)
    jobs, num_removed = [], 0
    for number in range(12):
        jobs.append(server.submit(**REAL, seed=number))
        server.status_is(jobs[-1], "running", "completed")
        shutil.rmtree(tmp_path / "data" / "spool", ignore_errors=True)
        num_removed += 1
    done = [server.status_is(job_id, "completed") for job_id in jobs]
    shutil.rmtree(tmp_path / "data" / "results")
    gone = server.client.get(f"/jobs/{jobs[0]}/video")
    assert gone.status_code == 410, gone.text
    again = server.status_is(server.submit(**REAL), "completed")
    attempts = sum(job["attempts"] for job in done)
    record(fault="vanished spool and results", removed=num_removed, jobs=len(jobs), completed=len(done))
    record(attempts=attempts, code="", next_good_s=round(sum(again["timings_ms"].values()) / 1000, 1))


def test_postgresql_restarted_under_load(postgres: Postgres, tmp_path: Path, record: Record) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    address = postgres.database()
    server = ServerProcess(folder, tmp_path / "data", "--store", address, "--max-attempts", "10")
    statuses: set[int] = set()
    try:
        server.start(is_ready=True)
        load = Load(server.address, [{"prompt": f"take 0.1 {number}", "seed": number} for number in range(6)])
        with load.running():
            for number in range(5):
                until(lambda number=number: len(load.accepted) > 8 * (number + 1), server.said)  # type: ignore[misc]
                postgres.restart()
                with contextlib.suppress(httpx.TransportError):
                    statuses.add(server.client.get("/jobs").status_code)
        until(lambda: server.answers("/ready"), server.said)
        found = check_all(server, load, sha256_of_fake, tmp_path / "data")
        assert statuses <= {200, 503}
        record(fault="PostgreSQL killed and restarted under load", restarts=5, code="", **found)
        assert server.stop() == 0
    finally:
        server.end()


def test_workers_and_encoders_end_with_their_server(sqlite_server: Server, tmp_path: Path, record: Record) -> None:
    """The last word of a killed server: nothing of it runs on."""
    server = sqlite_server("--threads", "1", is_fake=False)
    server.start(is_ready=True)
    for number in range(8):
        server.submit(**REAL, seed=number)
    until(lambda: server.client.get("/health").json()["is_running"], server.said)
    family = children(server.pid)
    family += [grandchild for child in family for grandchild in children(child)]
    server.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), lambda: str(family))
    record(fault="killed server", code="", processes=len(family), left=0)
