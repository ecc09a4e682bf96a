"""The dispatcher on a real store, with a runner in this process: restarts, leases, storage, expiry, leftovers."""

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runner import FACTS, FakeRunner, video_of
from stores import postgres as postgres
from stores import store_address as store_address

from codmd_serve import dispatcher as dispatcher_module
from codmd_serve.api.backend import Own
from codmd_serve.config import GenerateParams, ServeConfig
from codmd_serve.dispatcher import Dispatcher
from codmd_serve.errors import StoreError
from codmd_serve.jobs.leases import Finished, Leases
from codmd_serve.jobs.ownership import Ownership
from codmd_serve.jobs.rows import content_key
from codmd_serve.jobs.states import Job, NewJob
from codmd_serve.jobs.store import JobStore, QueueLimits
from codmd_serve.serving import Parts, make_dispatcher

PARAMS = GenerateParams(prompt="", seed=1, height=64, width=64, num_frames=17, fps=16, crf=18)
OWN = Own("b", "fake", "e", FACTS)
DEADLINE_S = 60.0


class World:
    """A store, and dispatchers that come and go."""

    def __init__(self, folder: Path, store: str = "", **settings: Any) -> None:
        self.folder = folder
        self.config = replace(ServeConfig(bundle=str(folder), data=str(folder / "data"), store=store), **settings)
        self.parts = Parts.open(self.config)
        self.store = JobStore(self.parts.database)

    def dispatcher(self) -> Dispatcher:
        return make_dispatcher(self.config, self.parts, OWN, FakeRunner())

    def submit(self, prompt: str, seed: int = 1) -> Job:
        params = replace(PARAMS, prompt=prompt, seed=seed)
        new = NewJob(params=params, bundle="b", content_key=content_key("b", "e", params))
        return self.store.submit(new, QueueLimits(1000), may_reuse=False)[0]

    def job(self, job: Job) -> Job:
        found = self.store.get(job.id)
        assert found is not None
        return found

    async def until(self, is_true: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_true():
                await asyncio.sleep(0.01)

    async def status_is(self, job: Job, status: str) -> Job:
        await self.until(lambda: self.job(job).status == status)
        return self.job(job)

    def video(self, job: Job) -> bytes:
        result = self.job(job).result
        assert result is not None
        return b"".join(self.parts.results.read(result.name, 0, result.num_bytes))

    def files(self) -> list[str]:
        """Everything but the store, relative to the data folder."""
        data = self.folder / "data"
        paths = [path for path in data.rglob("*") if path.is_file() and not path.name.startswith("jobs.sqlite3")]
        return sorted(str(path.relative_to(data)) for path in paths)


def play(world: World, story: Callable[[], Awaitable[None]]) -> None:
    try:
        asyncio.run(story())  # type: ignore[arg-type]
    finally:
        world.parts.database.close()


def killed_dispatcher(world: World) -> Leases:
    """What a killed dispatcher leaves: its name, a lock that nobody holds, half a video, and jobs that it claims."""
    ownership = Ownership(Path(world.config.data))
    (ownership.folder() / ".tmp-1.partial").write_bytes(b"half")
    os.close(ownership._lock)
    return Leases(world.parts.database, ownership.owner, "b", "fake", "e")


def test_jobs_run_in_order_and_their_results_are_kept(tmp_path: Path, store_address: str) -> None:
    world = World(tmp_path, store_address)

    async def story() -> None:
        jobs = [world.submit(prompt) for prompt in ("one", "two NEW", "three")]
        dispatcher = world.dispatcher()
        await dispatcher.start()
        done = [await world.status_is(job, "completed") for job in jobs]
        assert dispatcher.runner.ran == ["one", "two NEW", "three"]  # type: ignore[attr-defined]
        assert [world.video(job) for job in jobs] == [video_of(job.params) for job in jobs]
        assert done[1].warnings == ["NEW"] and done[1].peak_memory_mb == 12.5 and done[1].attempts == 1
        assert list(done[1].timings_ms) == ["queue", "text", "denoise", "decode", "encode"]
        await dispatcher.stop()
        assert not [name for name in world.files() if not name.startswith("results/")]

    play(world, story)


def test_a_killed_server_loses_nothing_and_pays_no_attempt(tmp_path: Path, store_address: str) -> None:
    world = World(tmp_path, store_address)

    async def story() -> None:
        jobs = [world.submit(str(number)) for number in range(4)]
        for _ in range(3):  # killed three times in a row, with max_attempts 2
            killed = killed_dispatcher(world)
            assert killed.claim() is not None and killed.claim() is not None
            await asyncio.to_thread(world.dispatcher()._release_dead)
        dispatcher = world.dispatcher()
        await dispatcher.start()
        done = [await world.status_is(job, "completed") for job in jobs]
        assert [job.attempts for job in done] == [1, 1, 1, 1]
        assert [world.video(job) for job in jobs] == [video_of(job.params) for job in jobs]
        await dispatcher.stop()
        assert not [name for name in world.files() if name.startswith("spool/")], "leftovers are swept"

    play(world, story)


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_video_of_a_dispatcher_that_was_killed_before_it_wrote_it_down_is_swept(
    tmp_path: Path, store_address: str, is_whole: bool
) -> None:
    """Killed between the rename of the file, or in the middle of the copy, and the commit of `completed`."""
    world = World(tmp_path, store_address)

    async def story() -> None:
        done, job = world.submit("a"), world.submit("b")
        killed = killed_dispatcher(world)
        assert killed.claim() is not None and killed.claim() is not None
        names = []
        for each in (done, job):
            video = tmp_path / "data" / "spool" / killed.owner / each.id / f"{each.id}.mp4"
            video.parent.mkdir()
            video.write_bytes(b"a video")
            result = world.parts.results.put(video, 60.0, dispatcher_module._result_id(killed.owner, each.id))
            names.append(f"results/{result.name}")
            if each is done:
                assert killed.finish(each.id, Finished(status="completed", result=result))
        if not is_whole:
            path = tmp_path / "data" / names[1]
            path.rename(path.with_name(f".tmp-{path.stem}.partial"))
        await asyncio.to_thread(world.dispatcher()._release_dead)
        assert [name for name in world.files() if name.startswith(("results", "spool"))] == names[:1]
        assert world.video(done) == b"a video" and world.job(job).status == "queued"

    play(world, story)


def test_jobs_of_a_live_dispatcher_are_left_to_it(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def story() -> None:
        gate = tmp_path / "gate"
        first, second = world.dispatcher(), world.dispatcher()
        job = world.submit(f"wait {gate}")
        await first.start()
        await world.status_is(job, "running")
        await second.start()
        other = world.submit("b")
        await world.status_is(other, "completed")
        assert second.runner.ran == ["b"]  # type: ignore[attr-defined]
        assert world.job(job).lease_owner == first.leases.owner
        gate.touch()
        await world.status_is(job, "completed")
        for dispatcher in (first, second):
            await dispatcher.stop()

    play(world, story)


def test_the_outcome_of_a_lost_lease_is_dropped_with_its_file(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def story() -> None:
        gate = tmp_path / "gate"
        dispatcher = world.dispatcher()
        await dispatcher.start()
        job = world.submit(f"deaf {gate}")
        await world.status_is(job, "running")
        with world.parts.database.write() as connection:
            from codmd_serve.jobs.schema import jobs_table

            connection.execute(jobs_table.update().values(lease_owner="another", lease_until=4e9))
        gate.touch()
        await world.until(lambda: not dispatcher._concluding)
        assert world.job(job).status == "running" and world.job(job).lease_owner == "another"
        assert not [name for name in world.files() if name.endswith(".mp4")]
        await dispatcher.stop()

    play(world, story)


def test_a_cancellation_written_by_another_process_is_obeyed(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def story() -> None:
        dispatcher = world.dispatcher()
        await dispatcher.start()
        job = world.submit("wait /dev/null/never")
        await world.status_is(job, "running")
        world.store.cancel(job.id)
        await world.status_is(job, "cancelled")
        await dispatcher.stop()

    play(world, story)


@pytest.mark.parametrize(("prompt", "code", "attempts"), [("oom", "out_of_memory", 1), ("die", "worker_died", 2)])
def test_a_failure_is_written_with_its_code(tmp_path: Path, prompt: str, code: str, attempts: int) -> None:
    world = World(tmp_path)

    async def story() -> None:
        dispatcher = world.dispatcher()
        await dispatcher.start()
        job = await world.status_is(world.submit(prompt), "failed")
        assert job.error_code == code and job.attempts == attempts and job.error_message
        await world.status_is(world.submit("good"), "completed")
        await world.until(lambda: not list(dispatcher.ownership.spool.iterdir()))
        await dispatcher.stop()

    play(world, story)


def test_a_job_that_others_always_take_down_ends_some_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "MAX_UNCHARGED", 3)
    world = World(tmp_path)

    async def story() -> None:
        from codmd_serve.worker_slot import JobFailed

        dispatcher = world.dispatcher()

        async def lost(*_: Any) -> Any:
            return JobFailed("worker_died", "the worker was lost to another job", True, counts_attempt=False)

        dispatcher.runner._make = lost  # type: ignore[attr-defined]
        await dispatcher.start()
        job = await world.status_is(world.submit("a"), "failed")
        assert job.error_code == "worker_died"
        await dispatcher.stop()

    play(world, story)


def test_a_place_that_cannot_be_written_keeps_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The video is made, cannot be kept, and is made again when it can: no attempt counts."""
    monkeypatch.setattr(dispatcher_module, "PROBE_S", 0.01)
    world = World(tmp_path)

    async def story() -> None:
        dispatcher = world.dispatcher()
        await dispatcher.start()
        put = world.parts.results.put
        check = world.parts.results.check

        def broken(*_: Any) -> Any:
            raise StoreError("the results place cannot be used: Input/output error")

        monkeypatch.setattr(world.parts.results, "put", broken)
        monkeypatch.setattr(world.parts.results, "check", broken)
        job = world.submit("a")
        await world.until(lambda: dispatcher.blocked)
        await world.status_is(job, "queued")
        assert not dispatcher.is_ready and "Input/output" in dispatcher.reason
        monkeypatch.setattr(world.parts.results, "put", put)
        monkeypatch.setattr(world.parts.results, "check", check)
        done = await world.status_is(job, "completed")
        assert done.attempts == 1 and dispatcher.is_ready
        await dispatcher.stop()

    play(world, story)


def test_a_spool_that_vanished_is_made_again(tmp_path: Path) -> None:
    """S9: cleaners of temporary files do that."""
    world = World(tmp_path)

    async def story() -> None:
        import shutil

        dispatcher = world.dispatcher()
        await dispatcher.start()
        await world.status_is(world.submit("a"), "completed")
        shutil.rmtree(tmp_path / "data" / "spool")
        await world.status_is(world.submit("b"), "completed")
        await dispatcher.stop()

    play(world, story)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_spool_that_cannot_be_made_keeps_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(dispatcher_module, "PROBE_S", 0.01)
    world = World(tmp_path)

    async def story() -> None:
        dispatcher = world.dispatcher()
        await dispatcher.start()
        mkdir = Path.mkdir

        def refuse(path: Path, *words: Any, **more: Any) -> None:
            if "spool" in path.parts:
                raise OSError(number, os.strerror(number))
            mkdir(path, *words, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse)
            job = world.submit("a")
            await world.until(lambda: dispatcher.blocked)
            assert str(tmp_path) not in dispatcher.blocked
        done = await world.status_is(job, "completed")
        assert done.attempts == 1 and dispatcher.is_ready
        await dispatcher.stop()

    play(world, story)


def test_calls_of_a_flood_of_requests_do_not_hold_up_jobs(tmp_path: Path) -> None:
    """Found by ten times the capacity on a busy machine: claims waited behind the requests that were refused."""
    world = World(tmp_path)

    async def story() -> None:
        dispatcher, over = world.dispatcher(), threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        flood = loop.run_in_executor(None, over.wait)
        try:
            await dispatcher.start()
            await world.status_is(world.submit("a"), "completed")
            await dispatcher.stop()
        finally:
            over.set()
            await flood

    play(world, story)


def test_an_outcome_waits_for_a_store_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "RETRY_S", 0.01)
    world = World(tmp_path)

    async def story() -> None:
        dispatcher = world.dispatcher()
        finish, calls = dispatcher.leases.finish, []

        def away(*arguments: Any) -> bool:
            calls.append(arguments)
            if len(calls) < 4:
                raise StoreError("the job store is away")
            return finish(*arguments)

        monkeypatch.setattr(dispatcher.leases, "finish", away)
        await dispatcher.start()
        await world.status_is(world.submit("a"), "completed")
        assert len(calls) == 4
        await dispatcher.stop()

    play(world, story)


def test_stopping_queues_what_runs_again_without_an_attempt(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def story() -> None:
        dispatcher = world.dispatcher()
        await dispatcher.start()
        job, waiting = world.submit("wait /dev/null/never"), world.submit("b")
        await world.status_is(job, "running")
        await dispatcher.stop()
        for each in (job, waiting):
            assert (world.job(each).status, world.job(each).attempts) == ("queued", 0)
        (model,) = world.store.models()
        assert not model.is_ready and model.capacity == 0

    play(world, story)


def test_old_results_and_files_of_no_job_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, result_max_mib=1)

    async def story() -> None:
        dispatcher = world.dispatcher()
        orphan = tmp_path / "data" / "results" / "ab" / "orphan.mp4"
        orphan.parent.mkdir(parents=True)
        orphan.write_bytes(b"x")
        os.utime(orphan, (1.0, 1.0))
        await dispatcher.start()
        await world.until(lambda: not orphan.exists())
        first = world.submit("first")
        await world.status_is(first, "completed")
        with world.parts.database.write() as connection:
            from codmd_serve.jobs.schema import results_table

            connection.execute(results_table.update().values(num_bytes=2**21))
        await asyncio.to_thread(dispatcher._expire)
        assert world.job(first).status == "expired"
        assert not [name for name in world.files() if name.endswith(".mp4")]
        await dispatcher.stop()

    play(world, story)


def test_a_data_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(StoreError, match=r"data folder .* cannot be written to: (Not a directory|File exists)"):
        Ownership(tmp_path / "data")
