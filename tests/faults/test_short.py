"""The short form of the fault tests: kills, a hang, a full disk, a cancel race, on SQLite and PostgreSQL.

Servers, workers and stores are real processes; the engine is a fake whose video is its parameters, so that what every
job must have become is known. The same faults with the real engine are in test_bytes.py.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk_at
from processes import Process, ServerProcess, until

Server = Callable[..., ServerProcess]
NUM_KILLS = 10


def video_of(job: Any) -> bytes:
    return b"mp4 " + json.dumps(job["params"]).encode()


def check(server: ServerProcess, job_id: str, attempts: int) -> None:
    job = server.status_is(job_id, "completed")
    assert server.video(job_id) == video_of(job)
    assert job["attempts"] == attempts, job


def test_ten_kills_of_the_worker_cost_ten_attempts_and_no_job(server: Server, tmp_path: Path) -> None:
    running = server()
    running.start(is_ready=True)
    for number in range(NUM_KILLS):
        gate = tmp_path / f"gate{number}"
        job_id = running.submit(f"wait {gate}")
        waiting = running.submit(f"behind it {number}")
        until(lambda job_id=job_id: running.job(job_id)["stage"] == "denoise", running.said)  # type: ignore[misc]
        os.kill(running.worker(), signal.SIGKILL)
        until(lambda job_id=job_id: running.job(job_id)["attempts"] == 2, running.said)  # type: ignore[misc]
        gate.touch()
        check(running, job_id, attempts=2)
        check(running, waiting, attempts=1)
    assert running.client.get("/health").json()["num_worker_restarts"] == NUM_KILLS
    assert running.stop() == 0
    assert not list((tmp_path / "data" / "spool").iterdir())


def test_ten_kills_of_the_server_lose_nothing_and_cost_no_attempt(server: Server, tmp_path: Path) -> None:
    running = server()
    gate = tmp_path / "gate"
    running.start(is_ready=True)
    held = running.submit(f"wait {gate}")
    jobs = []
    for number in range(NUM_KILLS):
        jobs += [running.submit(f"{number} {each}", seed=each) for each in range(3)]
        running.status_is(held, "running", "completed")
        if number == NUM_KILLS // 2:
            gate.touch()  # the second half of the kills hits short jobs, at whatever they are doing
        running.kill()
        running.start()
    for job_id in [held, *jobs]:
        check(running, job_id, attempts=1)
    assert running.stop() == 0
    assert not list((tmp_path / "data" / "spool").iterdir()), "leftovers of killed servers are swept"
    assert not list((tmp_path / "data" / "dispatchers").iterdir())


def test_a_worker_that_hangs_costs_its_job_and_not_the_server(server: Server, tmp_path: Path) -> None:
    """S1: it stops itself, as under kill -STOP, on both attempts."""
    running = server()
    running.start(is_ready=True)
    hanging, waiting = running.submit("stop"), running.submit("good")
    until(lambda: running.client.get("/ready").status_code == 503, running.said)
    assert running.client.get("/health").status_code == 200
    job = running.status_is(hanging, "failed")
    assert job["error"]["code"] == "worker_hung" and job["attempts"] == 2
    check(running, waiting, attempts=1)
    until(lambda: running.answers("/ready"), running.said)


def test_a_job_that_obeys_nothing_is_cancelled_all_the_same(server: Server) -> None:
    running = server("--cancel-timeout-s", "1")
    running.start(is_ready=True)
    deaf = running.submit("deaf /dev/null/never")
    running.status_is(deaf, "running")
    answer = running.client.delete(f"/jobs/{deaf}")
    assert answer.status_code == 200 and answer.json()["status"] == "cancelled"
    check(running, running.submit("good"), attempts=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 KiB."""
    with small_disk_at(tmp_path / "small", "300k") as folder:
        yield folder


def test_a_full_disk_keeps_the_queue(server: Server, small_disk: Path) -> None:
    """S8: 507 for the job that has no room, the others wait, and run when there is room."""
    running = server("--results", str(small_disk / "results"))
    running.start(is_ready=True)
    check(running, running.submit("before"), attempts=1)
    ballast = small_disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    answer = running.client.post("/generate", json={"prompt": "no room"})
    assert answer.status_code == 507 and answer.json()["error"]["code"] == "storage_full"
    refused = running.client.post("/generate", json={"prompt": "neither"})
    assert refused.status_code == 507 and refused.headers["retry-after"]
    ready = running.client.get("/ready")
    assert ready.status_code == 503 and "room" in ready.json()["reason"]
    ballast.unlink()
    until(lambda: running.answers("/ready"), running.said)
    check(running, running.submit("after"), attempts=1)
    shutil.rmtree(small_disk / "results")
    check(running, running.submit("made again"), attempts=1)


def test_a_cancellation_and_a_completion_never_both_win(server: Server, tmp_path: Path) -> None:
    """Whichever is first stays; every third job is cancelled while it waits, so that both ends are seen."""
    running = server()
    running.start(is_ready=True)
    seen = set()
    for number in range(30):
        gate = tmp_path / f"gate{number}"
        job_id = running.submit(f"wait {gate}")
        running.status_is(job_id, "running")
        answers: list[Any] = []
        racers = [threading.Thread(target=cancel, args=(running, job_id, answers)) for _ in range(2)]
        racers.append(threading.Thread(target=gate.touch))
        for racer in racers[: 2 if number % 3 == 0 else 3]:
            racer.start()
        for racer in racers[: 2 if number % 3 == 0 else 3]:
            racer.join()
        (status,) = {answer.json()["status"] for answer in answers}
        assert status in ("cancelled", "completed") and {answer.status_code for answer in answers} == {200}
        assert running.job(job_id)["status"] == status, "a final status is sticky"
        video = running.client.get(f"/jobs/{job_id}/video")
        assert video.status_code == (200 if status == "completed" else 409)
        seen.add(status)
    assert "cancelled" in seen
    check(running, running.submit("good"), attempts=1)


def cancel(running: ServerProcess, job_id: str, answers: list[Any]) -> None:
    answers.append(running.client.delete(f"/jobs/{job_id}"))


def test_an_api_and_two_workers_are_one_server(server: Server, tmp_path: Path, store_address: str) -> None:
    """serve --workers 0 and work: any API answers for any job, and a killed worker's jobs go to the other."""
    first, second = server("--workers", "0"), server("--workers", "0")
    data = tmp_path / "data"
    workers = []
    for number in range(2):
        folder = tmp_path / f"worker{number}"
        folder.mkdir()
        words = ("work", "--data", str(data), "--store", store_address, "--bundle", str(tmp_path / "server0"))
        workers.append(Process(folder, *words, "--lease-s", "3"))
    try:
        for api in (first, second):
            api.start()
            assert api.client.get("/ready").status_code == 503
        for worker in workers:
            worker.start()
        until(lambda: first.answers("/ready") and second.answers("/ready"), workers[0].said)
        gate = tmp_path / "gate"
        held = first.submit(f"wait {gate}", preview=True)
        # Progress is in no store: it comes from the worker's process, to whichever API is asked.
        for api in (first, second):
            until(lambda api=api: api.job(held)["stage"] == "denoise", workers[0].said)  # type: ignore[misc]
        jobs = [api.submit(f"{number}") for number, api in enumerate((first, second) * 3)]
        workers[0].kill()
        gate.touch()
        for job_id in [held, *jobs]:
            job = second.status_is(job_id, "completed")
            assert first.video(job_id) == second.video(job_id) == video_of(job)
        assert "event: step" in second.client.get(f"/jobs/{held}/events").text
        assert workers[1].stop() == 0
        until(lambda: "no worker serves" in first.client.get("/ready").json()["reason"], first.said)
        assert "no worker serves" in first.job(first.submit("nobody is there"))["waiting_for"]
    finally:
        for worker in workers:
            worker.end()
