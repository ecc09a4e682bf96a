"""The dispatcher when one worker holds several jobs: one encoding, one on the device, one sent ahead."""

import asyncio
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
from dispatching import Harness, Play

from codmd_serve.dispatcher import Job
from codmd_serve.errors import QueueFullError

pytestmark = pytest.mark.usefixtures("no_backoff")


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
