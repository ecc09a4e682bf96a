"""The dispatcher with real worker processes and a fake engine: order, bounds, cancelling, and every kind of death."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codmd_serve import dispatcher as dispatcher_module
from codmd_serve.config import ENGINE_SETTINGS, GenerateParams, ModelFacts, ServeConfig
from codmd_serve.dispatcher import Dispatcher, Job
from codmd_serve.errors import QueueFullError

PARAMS = GenerateParams(prompt="", seed=1, height=64, width=64, num_frames=17, fps=16, crf=18)
DEADLINE_S = 120.0

pytestmark = pytest.mark.usefixtures("_no_backoff")


@pytest.fixture
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "MAX_BACKOFF_S", 0.01)


class Harness:
    """A dispatcher whose workers are fake, and what it reported."""

    def __init__(self, folder: Path, command: tuple[str, ...], **settings: Any) -> None:
        self.folder = folder
        self.ready: list[ModelFacts] = []
        self.fatal: list[str] = []
        config = replace(ServeConfig(bundle=str(folder)), **settings)
        self.dispatcher = Dispatcher(config, command, self.ready.append, self.fatal.append)

    def submit(self, prompt: str) -> Job:
        return self.dispatcher.submit(replace(PARAMS, prompt=prompt))

    async def result(self, job: Job) -> str:
        await asyncio.wait_for(job.finished.wait(), DEADLINE_S)
        return job.status

    async def until(self, is_true: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_true():
                await asyncio.sleep(0.002)

    @property
    def starts(self) -> list[int]:
        path = self.folder / "starts"
        return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []

    def gate(self, name: str = "gate") -> Path:
        return self.folder / name


@pytest.fixture
def play(tmp_path: Path, fake_worker: tuple[str, ...]) -> Callable[..., None]:
    """Run a coroutine function with a started Harness; `settings` are those of ServeConfig."""

    def run(
        story: Callable[[Harness], Awaitable[None]], command: tuple[str, ...] = fake_worker, **settings: Any
    ) -> None:
        @asynccontextmanager
        async def started() -> Any:
            harness = Harness(tmp_path, command, **settings)
            await harness.dispatcher.start()
            try:
                yield harness
            finally:
                await harness.dispatcher.stop()

        async def main() -> None:
            async with started() as harness:
                await story(harness)

        asyncio.run(main())

    return run


Play = Callable[..., None]
Story = Callable[[Harness], Coroutine[Any, Any, None]]


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
        assert (harness.folder / "starts").read_text().split()[1:] == ["cpu", "bfloat16"]
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
        assert sorted(path.name for path in job.path.parent.iterdir()) == sorted([job.path.name, after.path.name])

    play(story)


def test_a_job_that_kills_every_worker_fails_and_the_next_one_works(play: Play) -> None:
    async def story(harness: Harness) -> None:
        job, after = harness.submit("die"), harness.submit("after")
        assert [await harness.result(each) for each in (job, after)] == ["failed", "completed"]
        assert job.error is not None and job.error.code == "worker_died"
        assert "the worker died 3 times on this job" in str(job.error)
        assert [path.name for path in after.path.parent.iterdir()] == [after.path.name]

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


async def overlapping(harness: Harness, *last: str) -> list[Job]:
    """One job in its encoder, one on the device, and one more for each of `last`."""
    jobs = [harness.submit(f"tail {harness.gate('encoded')}"), harness.submit(f"wait {harness.gate()}")]
    await harness.until(lambda: jobs[1].stage == "denoise")
    return jobs + [harness.submit(prompt) for prompt in last]


@pytest.mark.parametrize(
    ("overlap", "is_gpu", "is_overlapping"),
    [("on", False, True), ("auto", True, True), ("auto", False, False), ("off", True, False)],
)
def test_a_job_starts_beside_the_encoder_of_the_one_before_where_that_pays(
    play: Play, tmp_path: Path, overlap: str, is_gpu: bool, is_overlapping: bool
) -> None:
    async def story(harness: Harness) -> None:
        first, second = harness.submit(f"tail {harness.gate('encoded')}"), harness.submit(f"wait {harness.gate()}")
        await harness.until(lambda: first.stage == "decode")
        if is_overlapping:
            await harness.until(lambda: second.stage == "denoise")
            assert [first.status, second.status] == ["running", "running"]
        else:
            assert second.status == "queued" and harness.dispatcher.waiting == [second]
        harness.gate("encoded").touch()
        assert await harness.result(first) == "completed" and not second.finished.is_set()
        harness.gate().touch()
        assert await harness.result(second) == "completed"
        assert (second.started_at < first.finished_at) == is_overlapping  # type: ignore[operator]

    if is_gpu:
        (tmp_path / "gpu").touch()
    play(story, overlap=overlap)


def test_one_job_waits_at_the_worker_with_its_prompt_prepared_and_the_rest_in_order(play: Play) -> None:
    async def story(harness: Harness) -> None:
        jobs = await overlapping(harness, "third", "fourth", "fifth")
        prepared = harness.gate("prepared")
        await harness.until(lambda: prepared.exists() and "third\n" in prepared.read_text())
        assert [job.status for job in jobs] == ["running", "running", "queued", "queued", "queued"]
        assert harness.dispatcher.running is jobs[0] and harness.dispatcher.waiting == jobs[2:]
        assert "fourth" not in prepared.read_text(), "no more than one is sent ahead"
        harness.gate("encoded").touch()
        harness.gate().touch()
        assert [await harness.result(job) for job in jobs] == ["completed"] * 5
        finished = [job.finished_at for job in jobs]
        assert finished == sorted(finished)  # type: ignore[type-var]
        for job in jobs:
            assert json.dumps(job.params.prompt).encode() in job.path.read_bytes() and job.attempts == 1
            assert list(job.timings_ms) == ["queue", "text", "denoise", "decode", "encode"]

    play(story, overlap="on")


def test_a_job_that_was_sent_ahead_counts_as_waiting(play: Play) -> None:
    async def story(harness: Harness) -> None:
        jobs = await overlapping(harness, "third", "fourth")
        with pytest.raises(QueueFullError, match="2 jobs are waiting already"):
            harness.submit("fifth")
        harness.gate("encoded").touch()
        harness.gate().touch()
        assert [await harness.result(job) for job in jobs] == ["completed"] * 4

    play(story, overlap="on", queue_size=2)


def test_cancelling_a_job_that_was_sent_ahead_ends_it_before_its_turn(play: Play) -> None:
    async def story(harness: Harness) -> None:
        jobs = await overlapping(harness, "third", "fourth")
        await harness.until(lambda: harness.gate("prepared").exists())
        harness.dispatcher.cancel(jobs[2])
        assert await harness.result(jobs[2]) == "cancelled"
        assert jobs[1].status == "running" and jobs[2].attempts == 0 and jobs[2].started_at is None
        harness.gate("encoded").touch()
        harness.gate().touch()
        assert [await harness.result(job) for job in jobs] == ["completed", "completed", "cancelled", "completed"]
        assert not jobs[2].path.exists() and len(harness.starts) == 1

    play(story, overlap="on")


def test_cancelling_either_of_two_running_jobs_leaves_the_other(play: Play) -> None:
    async def story(harness: Harness) -> None:
        on_device = await overlapping(harness)
        harness.dispatcher.cancel(on_device[1])
        harness.gate("encoded").touch()
        assert [await harness.result(job) for job in on_device] == ["completed", "cancelled"]
        harness.gate("encoded").unlink()
        encoding = await overlapping(harness)
        harness.dispatcher.cancel(encoding[0])
        harness.gate("encoded").touch()
        harness.gate().touch()
        assert [await harness.result(job) for job in encoding] == ["cancelled", "completed"]
        assert not encoding[0].path.exists() and len(harness.starts) == 1

    play(story, overlap="on")


def test_all_jobs_of_a_worker_that_dies_are_done_again_in_order_and_one_by_one(play: Play) -> None:
    async def story(harness: Harness) -> None:
        jobs = await overlapping(harness, "third", "fourth")
        os.kill(harness.starts[0], signal.SIGKILL)
        harness.gate("encoded").touch()
        harness.gate().touch()
        assert [await harness.result(job) for job in jobs] == ["completed"] * 4
        # The death counts against the job that had the device, and against no other.
        assert [job.attempts for job in jobs] == [1, 2, 1, 1]
        for one, next_one in itertools.pairwise(jobs[:3]):
            assert one.finished_at <= next_one.started_at  # type: ignore[operator]
        assert len(harness.starts) == 2

    play(story, overlap="on")


def test_a_job_that_kills_its_worker_does_not_take_along_what_was_being_encoded(play: Play) -> None:
    async def story(harness: Harness) -> None:
        jobs = [harness.submit(prompt) for prompt in (f"tail {harness.gate('encoded')}", "die", "third")]
        await harness.until(lambda: len(harness.starts) > 1)
        harness.gate("encoded").touch()
        assert [await harness.result(job) for job in jobs] == ["completed", "failed", "completed"]
        assert jobs[1].error is not None and jobs[1].error.code == "worker_died"
        assert [job.attempts for job in jobs] == [1, 1, 1]

    play(story, overlap="on", max_attempts=1)


def test_stopping_fails_what_was_sent_ahead(tmp_path: Path, fake_worker: tuple[str, ...]) -> None:
    async def story() -> list[Job]:
        harness = Harness(tmp_path, fake_worker, overlap="on")
        await harness.dispatcher.start()
        jobs = await overlapping(harness, "third", "fourth")
        await harness.dispatcher.stop()
        return jobs

    jobs = asyncio.run(story())
    assert [job.error.code if job.error else "" for job in jobs] == ["shutting_down"] * 4
    assert not jobs[0].path.parent.exists()


BABBLER = """
import json, os, sys
sys.path.insert(0, {folder!r})
from dataclasses import asdict
from fake_worker import FACTS
sys.stdin.readline()
print(json.dumps({{"type": "ready", "facts": asdict(FACTS)}}), flush=True)
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
        load = {"type": "load", "bundle": str(tmp_path), **dict.fromkeys(ENGINE_SETTINGS, "auto")}
        process.stdin.write(json.dumps(load) + "\n")
        process.stdin.flush()
        assert '"ready"' in process.stdout.readline()
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 0
