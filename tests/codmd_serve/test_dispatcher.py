"""The dispatcher with real worker processes and a fake engine: order, bounds, cancelling, and every kind of death."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dispatching import DEADLINE_S, Harness, Play

from codmd_serve.config import ENGINE_SETTINGS
from codmd_serve.dispatcher import Job
from codmd_serve.errors import QueueFullError
from codmd_serve.messages import Load, Ready, decode, encode

pytestmark = pytest.mark.usefixtures("no_backoff")


def test_jobs_run_one_at_a_time_in_order(play: Play) -> None:
    async def story(harness: Harness) -> None:
        jobs = [harness.submit(f"wait {harness.gate()}"), harness.submit("two NEW WORDS"), harness.submit("three")]
        await harness.until(lambda: jobs[0].stage == "denoise")
        assert [job.status for job in jobs] == ["running", "queued", "queued"]
        assert 0.05 < jobs[0].progress < 0.7
        harness.gate().touch()
        assert [await harness.result(job) for job in jobs] == ["completed"] * 3
        assert jobs[0].finished_at <= jobs[1].started_at <= jobs[1].finished_at <= jobs[2].started_at  # type: ignore[operator]
        assert jobs[1].warnings == ["NEW", "WORDS"] and jobs[1].progress == 1.0
        assert list(jobs[1].timings_ms) == ["queue", "text", "denoise", "decode", "encode"]
        assert b'"prompt": "three"' in jobs[2].path.read_bytes()
        assert harness.ready and harness.dispatcher.is_ready and len(harness.starts) == 1

    play(story)


def test_the_worker_is_told_what_to_load(play: Play) -> None:
    async def story(harness: Harness) -> None:
        await harness.until(lambda: harness.ready)
        assert (harness.folder / "starts").read_text().split()[1:] == ["cpu", "bfloat16", "0"]
        assert harness.dispatcher.facts is harness.ready[0] and harness.ready[0].name == "fake"

    play(story, device="cpu", dtype="bfloat16")


def test_a_full_queue_refuses_and_says_when_to_come_back(play: Play) -> None:
    async def story(harness: Harness) -> None:
        await harness.until(lambda: harness.ready)
        running = harness.submit(f"wait {harness.gate()}")
        await harness.until(lambda: running.status == "running")
        waiting = [harness.submit("b"), harness.submit("c")]
        with pytest.raises(QueueFullError, match="2 jobs are waiting already") as caught:
            harness.submit("d")
        # Three jobs ahead at the 2.5 s that the engine says of itself.
        assert caught.value.retry_after_s == 8
        harness.gate().touch()
        assert [await harness.result(job) for job in waiting] == ["completed"] * 2
        assert await harness.result(harness.submit("e")) == "completed"

    play(story, queue_size=2)


def test_the_time_to_come_back_follows_what_jobs_take(play: Play) -> None:
    async def story(harness: Harness) -> None:
        for _ in range(12):
            assert await harness.result(harness.submit("quick")) == "completed"
        running = harness.submit(f"wait {harness.gate()}")
        await harness.until(lambda: running.status == "running")
        harness.submit("b")
        with pytest.raises(QueueFullError) as caught:
            harness.submit("c")
        assert caught.value.retry_after_s == 1

    play(story, queue_size=1)


@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        ("oom", "out_of_memory", "out of memory at this shape"),
        ("bug", "internal_error", "internal error; the server's"),
    ],
)
def test_a_job_that_fails_costs_only_itself(play: Play, prompt: str, code: str, message: str) -> None:
    async def story(harness: Harness) -> None:
        failing, good = harness.submit(prompt), harness.submit("good")
        assert [await harness.result(job) for job in (failing, good)] == ["failed", "completed"]
        assert failing.error is not None
        assert failing.error.code == code and str(failing.error).startswith(message)
        assert "secret" not in str(failing.error)
        assert len(harness.starts) == 1

    play(story)


def test_a_job_whose_worker_dies_is_tried_again(play: Play) -> None:
    async def story(harness: Harness) -> None:
        job, after = harness.submit(f"die-once {harness.gate()}"), harness.submit("after")
        assert [await harness.result(each) for each in (job, after)] == ["completed", "completed"]
        assert job.attempts == 2 and len(set(harness.starts)) == 2
        assert harness.dispatcher.num_restarts == 1
        assert len(harness.ready) == 1, "ready is said once"
        # What the dead worker had begun is gone.
        assert list(job.path.parent.iterdir()) == [job.path]

    play(story)


def test_a_job_that_kills_every_worker_fails_and_the_next_one_works(play: Play) -> None:
    async def story(harness: Harness) -> None:
        job, after = harness.submit("die"), harness.submit("after")
        assert [await harness.result(each) for each in (job, after)] == ["failed", "completed"]
        assert job.error is not None and job.error.code == "worker_died"
        assert "the worker died 3 times on this job" in str(job.error)
        assert list(after.path.parent.iterdir()) == [after.path] and not job.path.parent.exists()

    play(story, max_attempts=3)


def test_a_worker_killed_in_the_middle_of_a_job_is_replaced(play: Play) -> None:
    async def story(harness: Harness) -> None:
        job = harness.submit(f"wait {harness.gate()}")
        await harness.until(lambda: job.stage == "denoise")
        os.kill(harness.starts[0], signal.SIGKILL)
        await harness.until(lambda: job.attempts == 2 and job.stage == "denoise")
        harness.gate().touch()
        assert await harness.result(job) == "completed"

    play(story)


def test_an_idle_worker_that_is_killed_is_replaced(play: Play) -> None:
    async def story(harness: Harness) -> None:
        await harness.until(lambda: harness.ready)
        os.kill(harness.starts[0], signal.SIGKILL)
        await harness.until(lambda: not harness.dispatcher.is_ready)
        job = harness.submit("at once")
        assert await harness.result(job) == "completed"
        assert job.attempts == 1 and harness.dispatcher.is_ready

    play(story)


def test_a_worker_killed_while_it_loads_again_costs_no_job(play: Play) -> None:
    async def story(harness: Harness) -> None:
        await harness.until(lambda: harness.ready)
        (harness.folder / "deaths").write_text("1")
        job = harness.submit(f"die-once {harness.gate()}")
        assert await harness.result(job) == "completed"
        assert len(harness.starts) == 3

    play(story)


def test_workers_that_never_load_again_fail_what_waits_and_the_server_goes_on(play: Play) -> None:
    async def story(harness: Harness) -> None:
        await harness.until(lambda: harness.ready)
        (harness.folder / "deaths").write_text("1000")
        job = harness.submit(f"die-once {harness.gate()}")
        assert await harness.result(job) == "failed"
        assert job.error is not None and job.error.code == "worker_died"
        (harness.folder / "deaths").write_text("0")
        await harness.until(lambda: harness.dispatcher.is_ready)
        assert await harness.result(harness.submit("after")) == "completed"

    play(story)


def test_a_bundle_that_goes_bad_fails_what_waits_with_its_reason(play: Play) -> None:
    async def story(harness: Harness) -> None:
        await harness.until(lambda: harness.ready)
        (harness.folder / "fatal").touch()
        job = harness.submit(f"die-once {harness.gate()}")
        assert await harness.result(job) == "failed"
        assert str(job.error) == "the worker cannot be restarted: the bundle is truncated"
        assert not harness.fatal, "a server that has served stays up"

    play(story)


def test_a_first_worker_that_cannot_load_is_fatal(play: Play, tmp_path: Path) -> None:
    async def story(harness: Harness) -> None:
        await harness.until(lambda: harness.fatal)
        assert harness.fatal == ["the bundle is truncated"]
        assert harness.dispatcher.facts is None and not harness.dispatcher.is_ready

    (tmp_path / "fatal").touch()
    play(story)


def test_a_first_worker_that_dies_while_loading_is_fatal(play: Play) -> None:
    async def story(harness: Harness) -> None:
        await harness.until(lambda: harness.fatal)
        assert harness.fatal == ["the worker process ended while loading; its own words are above"]

    play(story, (sys.executable, "-c", "raise SystemExit(3)"))


def test_a_worker_that_cannot_be_started_is_fatal(play: Play) -> None:
    async def story(harness: Harness) -> None:
        await harness.until(lambda: harness.fatal)
        assert "No such file" in harness.fatal[0]

    play(story, ("/nowhere/python",))


BABBLER = """
import sys
sys.path.insert(0, {folder!r})
from codmd_serve.messages import Ready, encode
from fake_worker import FACTS
sys.stdin.readline()
print(encode(Ready(FACTS)).decode(), end="", flush=True)
sys.stdin.readline()
print({said}, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("said", ["'Segmentation fault'", "'x' * 2**21", "'[1]'", "'{}'"])
def test_a_worker_that_talks_nonsense_is_replaced(play: Play, fake_worker: tuple[str, ...], said: str) -> None:
    async def story(harness: Harness) -> None:
        job = harness.submit("a")
        assert await harness.result(job) == "failed"
        assert job.error is not None and job.error.code == "worker_died"
        assert harness.dispatcher.num_restarts >= 1

    folder = str(Path(fake_worker[1]).parent)
    play(story, (sys.executable, "-c", BABBLER.format(folder=folder, said=said)))


def test_cancelling_a_job_that_waits_takes_it_out_at_once(play: Play) -> None:
    async def story(harness: Harness) -> None:
        running, waiting = harness.submit(f"wait {harness.gate()}"), harness.submit("never")
        await harness.until(lambda: running.status == "running")
        harness.dispatcher.cancel(waiting)
        assert waiting.status == "cancelled" and waiting.finished.is_set()
        harness.gate().touch()
        assert await harness.result(running) == "completed"
        assert not waiting.path.exists() and waiting.attempts == 0

    play(story)


def test_cancelling_a_running_job_stops_it_and_keeps_the_worker(play: Play) -> None:
    async def story(harness: Harness) -> None:
        running, after = harness.submit("wait /nowhere/at/all"), harness.submit("after")
        await harness.until(lambda: running.stage == "denoise")
        harness.dispatcher.cancel(running)
        assert [await harness.result(job) for job in (running, after)] == ["cancelled", "completed"]
        assert len(harness.starts) == 1 and not running.path.exists()

    play(story)


def test_a_cancelled_job_whose_worker_dies_is_not_tried_again(play: Play) -> None:
    async def story(harness: Harness) -> None:
        running = harness.submit("wait /nowhere/at/all")
        await harness.until(lambda: running.stage == "denoise")
        os.kill(harness.starts[0], signal.SIGKILL)
        harness.dispatcher.cancel(running)
        assert await harness.result(running) == "cancelled"
        assert running.attempts == 1

    play(story)


def test_cancelling_a_finished_job_changes_nothing(play: Play) -> None:
    async def story(harness: Harness) -> None:
        job = harness.submit("a")
        await harness.result(job)
        harness.dispatcher.cancel(job)
        assert job.status == "completed" and job.path.exists()

    play(story)


def test_only_recent_jobs_are_remembered_and_unfinished_ones_always(play: Play) -> None:
    async def story(harness: Harness) -> None:
        first = harness.submit("a")
        await harness.result(first)
        running = harness.submit(f"wait {harness.gate()}")
        later = [harness.submit(name) for name in "bcd"]
        assert harness.dispatcher.job(first.id) is None
        assert all(harness.dispatcher.job(job.id) is job for job in [running, *later])
        harness.gate().touch()
        await harness.result(later[-1])
        assert harness.dispatcher.job("never seen") is None

    play(story, jobs_kept=2)


def test_stopping_fails_what_is_not_finished_and_leaves_nothing(tmp_path: Path, fake_worker: tuple[str, ...]) -> None:
    async def story() -> tuple[Job, Job, int]:
        harness = Harness(tmp_path, fake_worker)
        await harness.dispatcher.start()
        running, waiting = harness.submit("wait /nowhere/at/all"), harness.submit("b")
        await harness.until(lambda: running.stage == "denoise")
        await harness.dispatcher.stop()
        return running, waiting, harness.starts[0]

    running, waiting, worker = asyncio.run(story())
    for job in (running, waiting):
        assert job.status == "failed" and job.error is not None and job.error.code == "shutting_down"
    assert not running.path.parent.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_worker_ends_when_its_server_is_gone(tmp_path: Path, fake_worker: tuple[str, ...]) -> None:
    with subprocess.Popen(fake_worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(encode(Load(str(tmp_path), dict.fromkeys(ENGINE_SETTINGS, "auto"))).decode())
        process.stdin.flush()
        assert any(isinstance(decode(line), Ready) for line in process.stdout), "heartbeats may come before it"
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 0
