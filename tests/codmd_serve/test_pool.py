"""The pool with real worker processes and a fake engine: places, outcomes, and every way to hang or die."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pooling import PoolHarness, run_pool

from codmd_serve import pool as pool_module
from codmd_serve import worker_slot
from codmd_serve.messages import Progress, Started
from codmd_serve.pool import JobCancelled, JobDone, JobFailed
from codmd_serve.worker_process import WorkerProcess

pytestmark = pytest.mark.usefixtures("no_backoff")
Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, fake_worker: tuple[str, ...]) -> Run:
    """Run a coroutine function with a started PoolHarness."""

    def run(story: object, **settings: object) -> None:
        run_pool(story, tmp_path, fake_worker, **settings)  # type: ignore[arg-type]

    return run


def is_gone(pid: int) -> bool:
    """Whether a process ended; one that nobody has collected yet counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_job_runs_with_its_events_in_order(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        job = harness.submit("two WORDS")
        assert await job.outcome() == JobDone(
            {"text": 1.0, "denoise": 20.25, "decode": 3.0, "encode": 4.0}, ["WORDS"], 12.5
        )
        assert job.events == [Started("j1"), Progress("j1", "text", 1, 1)]
        assert job.job.path.exists()

    run(story)


def test_a_failure_of_the_job_is_not_one_of_the_worker(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        assert await harness.submit("oom").outcome() == JobFailed("out_of_memory", "out of memory at this shape")
        assert isinstance(await harness.submit("next").outcome(), JobDone)
        assert len(harness.starts) == 1 and not harness.pool.restarts

    run(story)


def test_the_least_loaded_worker_gets_the_next_job(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        await harness.until(lambda: harness.pool.num_workers == 3)
        assert harness.pool.capacity == 3 and harness.devices == ["auto"] * 3
        jobs = [harness.submit(f"wait {harness.gate()}") for _ in range(4)]
        assert harness.pool.capacity == 0
        await harness.until(lambda: all(job.is_started for job in jobs[:3]))
        assert not jobs[3].is_started and harness.pool.seconds_to_place() > 0
        harness.gate().touch()
        assert [type(await job.outcome()) for job in jobs] == [JobDone] * 4
        await harness.pool.wait_for_capacity()
        assert harness.pool.capacity == 3

    run(story, workers="3")


def test_one_worker_per_gpu_and_no_more(run: Run, tmp_path: Path) -> None:
    async def story(harness: PoolHarness) -> None:
        await harness.until(lambda: harness.pool.num_workers == 2)
        assert sorted(harness.devices) == ["auto", "cuda:1"]

    (tmp_path / "gpu").touch()
    run(story)


def test_a_named_gpu_has_one_worker(run: Run, tmp_path: Path) -> None:
    async def story(harness: PoolHarness) -> None:
        await harness.until(lambda: harness.pool.facts is not None)
        assert await harness.submit("a").outcome() and harness.devices == ["cuda:1"]

    (tmp_path / "gpu").touch()
    run(story, device="cuda:1")


@pytest.mark.parametrize(("workers", "threads"), [("auto", "0"), ("2", None)])
def test_workers_share_the_cores(run: Run, tmp_path: Path, workers: str, threads: str | None) -> None:
    async def story(harness: PoolHarness) -> None:
        await harness.until(lambda: harness.pool.is_ready)
        said = (tmp_path / "starts").read_text().split()[3]
        assert said == (threads or str(max(1, pool_module.usable_cpus() // 2)))

    run(story, workers=workers)


def test_what_the_first_worker_chose_by_measuring_holds_for_all_later_ones(run: Run, tmp_path: Path) -> None:
    async def story(harness: PoolHarness) -> None:
        await harness.until(lambda: harness.pool.num_workers == 2)
        assert isinstance(await harness.submit("die").outcome(), JobFailed)
        await harness.until(lambda: len(harness.starts) == 3)
        dtypes = [line.split()[2] for line in (tmp_path / "starts").read_text().splitlines()]
        assert dtypes == ["auto", "float32", "float32"]

    run(story, workers="2")


def test_with_overlap_three_jobs_are_in_flight_on_one_worker(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        jobs = [harness.submit(f"tail {harness.gate('encoded')}"), harness.submit(f"wait {harness.gate()}")]
        await harness.until(lambda: jobs[1].stage == "denoise")
        assert harness.pool.capacity == 1
        jobs += [harness.submit("third"), harness.submit("alone", is_alone=True)]
        assert harness.pool.capacity == 0
        harness.gate("encoded").touch()
        harness.gate().touch()
        assert [type(await job.outcome()) for job in jobs] == [JobDone] * 4

    run(story, overlap="on")


@pytest.mark.parametrize("is_started", [True, False])
def test_cancelling_ends_a_job_wherever_it_is(run: Run, is_started: bool) -> None:
    async def story(harness: PoolHarness) -> None:
        first, second = harness.submit("wait /nowhere/at/all"), harness.submit("never")
        await harness.until(lambda: first.stage == "denoise")
        harness.pool.cancel((first if is_started else second).job.id)
        assert await (first if is_started else second).outcome() == JobCancelled()
        assert not (first if is_started else second).job.path.exists()
        harness.pool.cancel("unknown")

    run(story)


def test_cancelling_the_task_that_awaits_a_job_cancels_the_job(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        job = harness.submit("wait /nowhere/at/all")
        await harness.until(lambda: job.stage == "denoise")
        events: list[object] = []
        request = harness.submit("x").job
        harness.pool.cancel(request.id)
        task = asyncio.create_task(
            harness.pool.run(pool_module.JobRequest(id="t", params=request.params, path=request.path), events.append)
        )
        await harness.until(lambda: harness.pool.num_waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        harness.pool.cancel(job.job.id)
        assert await job.outcome() == JobCancelled()
        await harness.pool.wait_for_capacity()
        assert not events, "it never started"

    run(story)


def test_a_job_that_was_faster_than_its_cancellation_is_done(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        job = harness.submit(f"deaf {harness.gate()}")
        await harness.until(lambda: job.stage == "text")
        harness.pool.cancel(job.job.id)
        harness.gate().touch()  # it asks no more before it is done
        assert isinstance(await job.outcome(), JobDone) and job.job.path.exists()
        assert not harness.pool.restarts

    run(story, cancel_timeout_s=60)


def test_a_cancellation_that_is_not_obeyed_kills_the_worker(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        deaf, after = harness.submit("deaf /nowhere/at/all"), harness.submit("after")
        await harness.until(lambda: deaf.stage == "text")
        harness.pool.cancel(deaf.job.id)
        assert await deaf.outcome() == JobCancelled()
        assert isinstance(await after.outcome(), JobDone)
        assert harness.pool.restarts == {"cancel_timeout": 1}

    run(story, cancel_timeout_s=1)


def test_s1_a_stopped_worker_is_noticed_killed_and_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_slot, "SUSPECT_SILENCE_S", 2.0)
    monkeypatch.setattr(worker_slot, "MAX_SILENCE_S", 4.0)

    async def story(harness: PoolHarness) -> None:
        job = harness.submit(f"wait {harness.gate()}")
        await harness.until(lambda: job.stage == "denoise")
        os.kill(harness.starts[0], signal.SIGSTOP)
        await harness.until(lambda: not harness.pool.is_ready)
        assert harness.pool.num_hanging == 1, "it is not dead yet, and not ready any more"
        failed = await job.outcome()
        assert failed == JobFailed("worker_hung", "the worker made no progress and was killed", True, True)
        await harness.until(lambda: harness.pool.is_ready)
        assert isinstance(await harness.submit("after").outcome(), JobDone)
        assert harness.pool.restarts == {"silent": 1} and is_gone(harness.starts[0])

    run(story)


def test_s1_an_idle_worker_that_is_stopped_is_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_slot, "MAX_SILENCE_S", 4.0)

    async def story(harness: PoolHarness) -> None:
        await harness.until(lambda: harness.pool.is_ready)
        os.kill(harness.starts[0], signal.SIGSTOP)
        await harness.until(lambda: harness.pool.restarts)
        await harness.until(lambda: harness.pool.is_ready)
        assert harness.pool.restarts == {"silent": 1}

    run(story)


def test_s1_a_job_without_progress_kills_its_worker_and_what_that_started(run: Run, tmp_path: Path) -> None:
    async def story(harness: PoolHarness) -> None:
        job = harness.submit(f"child {tmp_path / 'child'}")  # 5 times 0.1 s expected, and 1 s
        failed = await job.outcome()
        assert isinstance(failed, JobFailed) and failed.code == "worker_hung"
        assert failed.is_retryable and failed.counts_attempt
        await harness.until(lambda: is_gone(int((tmp_path / "child").read_text())))
        assert harness.pool.restarts == {"stalled": 1}

    (tmp_path / "service_s").write_text("0.1")
    run(story, stall_timeout_s=1)


def test_s1_a_job_that_only_seems_to_progress_has_a_deadline(run: Run, tmp_path: Path) -> None:
    async def story(harness: PoolHarness) -> None:
        failed = await harness.submit("busy /nowhere/at/all").outcome()
        assert isinstance(failed, JobFailed) and failed.code == "worker_hung" and failed.counts_attempt
        assert harness.pool.restarts == {"deadline": 1}

    (tmp_path / "service_s").write_text("0.1")
    run(story, stall_timeout_s=1)


def test_a_job_whose_encoder_is_slow_is_no_stalled_one(run: Run, tmp_path: Path) -> None:
    """All frames are decoded: ffmpeg gets 30 s more, within which it says itself that it hangs."""

    async def story(harness: PoolHarness) -> None:
        job = harness.submit(f"tail {harness.gate()}")
        await harness.until(lambda: job.stage == "decode")
        (entry,) = harness.pool._slots[0].in_flight
        entry.last_event_s -= 12.0  # long past the 1.5 s of a stalled job
        assert entry.started_s is not None
        entry.started_s -= 12.0
        limits, times = harness.pool._limits, harness.pool._times
        assert times is not None and not harness.pool._slots[0].hangs(limits, times)
        harness.pool._slots[0].kill_if_hung(limits, times)
        harness.gate().touch()
        assert isinstance(await job.outcome(), JobDone)
        assert not harness.pool.restarts

    (tmp_path / "service_s").write_text("0.1")
    run(story, stall_timeout_s=1)


def test_a_pool_that_stood_still_itself_blames_nobody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_slot, "MAX_SILENCE_S", 1.5)

    async def story(harness: PoolHarness) -> None:
        job = harness.submit(f"wait {harness.gate()}")
        await harness.until(lambda: job.stage == "denoise")
        end_s = time.monotonic() + 2.5
        while time.monotonic() < end_s:  # the event loop hangs
            pass
        harness.gate().touch()
        assert isinstance(await job.outcome(), JobDone)
        assert not harness.pool.restarts

    run(story)


def test_a_death_counts_for_the_job_that_had_the_device_only(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        jobs = [harness.submit(f"tail {harness.gate('encoded')}"), harness.submit(f"wait {harness.gate()}")]
        await harness.until(lambda: jobs[1].stage == "denoise")
        jobs.append(harness.submit("third"))
        os.kill(harness.starts[0], signal.SIGKILL)
        outcomes = [await job.outcome() for job in jobs]
        assert [type(each) for each in outcomes] == [JobFailed] * 3
        assert [each.code for each in outcomes if isinstance(each, JobFailed)] == ["worker_died"] * 3
        assert [each.counts_attempt for each in outcomes if isinstance(each, JobFailed)] == [False, True, False]
        assert all(each.is_retryable for each in outcomes if isinstance(each, JobFailed))

    run(story, overlap="on")


def test_a_death_counts_for_both_jobs_that_had_the_device(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        jobs = [harness.submit(f"decode {harness.gate('decoded')}"), harness.submit(f"wait {harness.gate()}")]
        await harness.until(lambda: jobs[1].stage == "denoise")
        jobs.append(harness.submit("third"))
        os.kill(harness.starts[0], signal.SIGKILL)
        outcomes = [await job.outcome() for job in jobs]
        # Each is tried again alone, so the next death has one suspect.
        assert [each.counts_attempt for each in outcomes if isinstance(each, JobFailed)] == [True, True, False]

    run(story, overlap="on")


def test_g4_a_device_error_ends_the_worker_and_the_job_may_be_tried_again(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        assert await harness.submit("device").outcome() == JobFailed("device_error", "the device failed", True, True)
        assert isinstance(await harness.submit("after").outcome(), JobDone)
        assert harness.pool.restarts == {"device_error": 1} and len(set(harness.starts)) == 2

    run(story)


def test_s9_the_folder_of_a_video_is_made_when_it_vanished(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        job = harness.submit("a")
        assert isinstance(await job.outcome(), JobDone)
        job.job.path.unlink()
        job.job.path.parent.rmdir()
        assert isinstance(await harness.submit("b").outcome(), JobDone)

    run(story)


def test_previews_come_with_a_step_when_they_were_asked_for(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        asked, other = harness.submit("a", is_previewed=True), harness.submit("b")
        assert isinstance(await asked.outcome(), JobDone) and isinstance(await other.outcome(), JobDone)
        previews = [event.preview for event in asked.events if isinstance(event, Progress)]
        assert previews == ["data:image/webp;base64,YSBwaWN0dXJl"]
        assert not any(event.preview for event in other.events if isinstance(event, Progress))

    run(story)


def test_s17_a_spare_takes_over_and_another_one_is_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "SPARE_DELAY_S", 0.0)

    async def story(harness: PoolHarness) -> None:
        for _ in range(2):
            await harness.until(lambda: harness.pool.is_ready and harness.pool.spare_pid is not None)
            spare, dead = harness.pool.spare_pid, harness.starts[-1]
            assert spare != dead
            os.kill(dead, signal.SIGKILL)
            await harness.until(lambda dead=dead: harness.pool.is_ready and harness.starts[-1] != dead)
            assert harness.starts[-1] == spare, "the process whose imports are done"
        assert isinstance(await harness.submit("after").outcome(), JobDone)

    run(story, spare_worker=True)


def test_a_spare_that_died_is_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "SPARE_DELAY_S", 0.0)

    async def story(harness: PoolHarness) -> None:
        await harness.until(lambda: harness.pool.spare_pid is not None)
        first = harness.pool.spare_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await harness.until(lambda: harness.pool.spare_pid not in (None, first))
        assert not harness.pool.restarts

    run(story, spare_worker=True)


def test_a_caller_whose_callback_fails_harms_nobody(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def story(harness: PoolHarness) -> None:
        def fails(_: object) -> None:
            raise RuntimeError("of the caller")

        request = harness.submit("a").job
        failing = pool_module.JobRequest(id="f", params=request.params, path=request.path)
        assert isinstance(await harness.pool.run(failing, fails), JobDone)
        assert "of the caller" in caplog.text and not harness.pool.restarts

    run(story)


def test_a_process_that_does_not_die_does_not_keep_its_jobs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver can keep a killed process alive; here nobody kills it."""
    monkeypatch.setattr(worker_slot, "MAX_DYING_S", 0.5)

    async def story(harness: PoolHarness) -> None:
        job = harness.submit(f"deaf {harness.gate()}")
        await harness.until(lambda: job.stage == "text")
        with monkeypatch.context() as patch:
            patch.setattr(WorkerProcess, "kill", lambda _: None)
            harness.pool.cancel(job.job.id)
            assert await job.outcome() == JobCancelled()
            assert not harness.pool.is_ready or not harness.pool.capacity
        harness.gate().touch()

    run(story, cancel_timeout_s=1)


def test_draining_lets_jobs_in_flight_end_and_takes_no_more(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        running, waiting = harness.submit(f"wait {harness.gate()}"), harness.submit("never")
        await harness.until(lambda: running.stage == "denoise")
        stopping = asyncio.create_task(harness.pool.stop(drain_s=60.0))
        refused = await waiting.outcome()
        assert isinstance(refused, JobFailed) and refused.code == "shutting_down"
        assert refused.is_retryable and not refused.counts_attempt
        assert await harness.submit("late").outcome() == refused
        harness.gate().touch()
        assert isinstance(await running.outcome(), JobDone)
        await stopping
        assert is_gone(harness.starts[0])

    run(story)


def test_what_does_not_end_while_draining_is_lost_and_counts_no_attempt(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        running = harness.submit("wait /nowhere/at/all")
        await harness.until(lambda: running.stage == "denoise")
        await harness.pool.stop(drain_s=0.05)
        failed = await running.outcome()
        assert isinstance(failed, JobFailed) and failed.code == "shutting_down" and not failed.counts_attempt

    run(story)


def test_the_expected_time_follows_shape_and_what_jobs_took(run: Run) -> None:
    async def story(harness: PoolHarness) -> None:
        params = harness.submit("a").job.params
        assert harness.pool.service_s(params) == 0.0, "nothing is loaded yet"
        await harness.until(lambda: harness.pool.is_ready)
        first_s = harness.pool.service_s(params)
        for _ in range(10):
            await harness.submit("quick").outcome()
        assert harness.pool.service_s(params) < first_s

    run(story)
