"""Claims jobs from the store and runs them on workers: leases, heartbeats, attempts, results, expiry.

Guarantees: a job is `completed` only when its video is whole and flushed to disk; a job whose worker or server is
killed runs again. Knows the store and a runner (`pool.WorkerPool`, or replicas elsewhere), no HTTP and no torch.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from codmd_serve.config import GenerateParams, ModelFacts, ServeConfig
from codmd_serve.errors import CodmdError, StorageFullError, StoreError
from codmd_serve.jobs.events import EventHub
from codmd_serve.jobs.leases import Finished, Leases
from codmd_serve.jobs.ownership import Ownership
from codmd_serve.jobs.results import ResultStore
from codmd_serve.jobs.states import CANCELLED, COMPLETED, FAILED, Job
from codmd_serve.jobs.store import JobStore
from codmd_serve.messages import Started
from codmd_serve.worker_slot import Event, JobCancelled, JobDone, JobFailed, JobRequest, OnEvent, Outcome

POLL_S = 1.0  # how soon a job is seen that another process wrote, where nothing notifies
WATCH_S = 1.0
SWEEP_S = 30.0
LEFTOVERS_S = 3600.0
PROBE_S = 2.0
NUM_THREADS = 4
RETRY_S = 0.5
STORAGE_CODES = ("storage_full", "storage_unwritable")
# An uncharged retry is the fault of another job or of the server; without a bound a broken machine would go round.
MAX_UNCHARGED = 20

Value = TypeVar("Value")
logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Interface of what runs jobs; see pool.WorkerPool."""

    facts: ModelFacts | None
    load_error: str

    @property
    def is_ready(self) -> bool: ...

    @property
    def num_workers(self) -> int: ...

    @property
    def num_hanging(self) -> int: ...

    async def start(self) -> None: ...

    async def stop(self, drain_s: float = 0.0) -> None: ...

    def submit(self, job: JobRequest, on_event: OnEvent) -> "asyncio.Future[Outcome]": ...

    def cancel(self, job_id: str) -> None: ...

    async def wait_for_capacity(self) -> None: ...

    def service_s(self, params: GenerateParams) -> float: ...

    def seconds_to_place(self) -> float: ...


class Dispatcher:
    """Run the jobs of one bundle on one event loop.

    Args:
        config: attempts, lease and expiry.
        store, leases, results: where jobs and videos are; `leases` is named after `ownership`.
        ownership: name and spool of this dispatcher.
        runner: not started yet.
        hub: is told of progress.
        deliver: calls the webhook of a finished job: True when it is delivered; None delivers none.
        on_finished: told of every job that ended here.

    Attributes:
        blocked: why no job is claimed at present though workers are ready; empty when they are.
    """

    def __init__(
        self,
        config: ServeConfig,
        store: JobStore,
        leases: Leases,
        results: ResultStore,
        ownership: Ownership,
        runner: Runner,
        hub: EventHub,
        deliver: Callable[[Job], Awaitable[bool]] | None = None,
        on_finished: Callable[[Job, Finished], None] | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.leases = leases
        self.results = results
        self.ownership = ownership
        self.runner = runner
        self.hub = hub
        self.deliver = deliver
        self.on_finished = on_finished
        self.blocked = ""
        self.blocked_code = ""
        self._in_flight: set[str] = set()
        self._is_claiming = False
        self._early: set[str] = set()
        self._concluding: set[asyncio.Task[None]] = set()
        self._uncharged: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False
        # Of its own: behind the calls of a flood of requests a finished job would wait, and no other would begin.
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="codmd-dispatcher")

    async def start(self) -> None:
        """Requeue the jobs of killed predecessors, start the workers and begin to claim. Return at once."""
        await self._in_thread(self._release_dead)
        await self._check_results()
        await self.runner.start()
        loops = [self._claim, self._watch, self._sweep]
        if self.deliver is not None:
            loops.append(self._deliver)
        self._tasks = [asyncio.create_task(self._for_ever(loop)) for loop in loops]

    async def stop(self, drain_s: float = 0.0) -> None:
        """Stop claiming, wait up to `drain_s` seconds for running jobs, and requeue the rest."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.runner.stop(drain_s)
        await asyncio.gather(*self._concluding, return_exceptions=True)
        with contextlib.suppress(CodmdError):
            await self._in_thread(self.leases.release)
            await self._in_thread(self.leases.forget_dispatcher, self.leases.owner)
        self.ownership.release()
        self._threads.shutdown(wait=False)

    def wake(self) -> None:
        """Check for jobs now."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Cancel a job that runs here; the store already knows."""
        if job_id in self._in_flight:
            self.runner.cancel(job_id)
        elif self._is_claiming:
            self._early.add(job_id)

    @property
    def is_ready(self) -> bool:
        """Return whether a new job would start as soon as a worker is free, and no worker hangs."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Return why it is not ready; empty when it is."""
        if self._is_stopping:
            return "the server is shutting down"
        if self.blocked:
            return self.blocked
        if self.runner.num_hanging:
            return "a worker hangs and is about to be replaced"
        if self.runner.is_ready:
            return ""
        return self.runner.load_error or ("no worker is alive" if self.runner.facts else "the model is loading")

    @property
    def num_running(self) -> int:
        return len(self._in_flight)

    async def _in_thread(self, function: Callable[..., Value], *arguments: Any, **named: Any) -> Value:
        call = functools.partial(function, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _release_dead(self) -> None:
        for owner in self.ownership.dead():
            num_jobs = self.leases.release(owner)
            self.leases.forget_dispatcher(owner)
            self._discard(owner)
            self.ownership.sweep(owner)
            logger.warning("dispatcher=%s was killed, jobs=%d are queued again", owner, num_jobs)

    def _discard(self, owner: str) -> None:
        """Delete the videos that a killed dispatcher had put in their place, but not written down."""
        result_ids = {_result_id(owner, job_id) for job_id in self.ownership.unfinished(owner)}
        for result_id in result_ids - self.store.has_results(sorted(result_ids)):
            self.results.discard(result_id)

    async def _for_ever(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Call `loop` for ever; retry after an error of the store, and after any other: nobody would start it again."""
        while True:
            try:
                await loop()
            except CodmdError as error:
                logger.error("%s", error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                logger.exception("loop=%s", loop.__name__)
                await asyncio.sleep(RETRY_S)

    # Claiming and running

    async def _claim(self) -> None:
        await self.runner.wait_for_capacity()
        if self.blocked:
            await asyncio.sleep(PROBE_S)
            await self._check_results()
            return
        self._wake.clear()
        self._is_claiming = True
        self._early.clear()
        claiming = asyncio.ensure_future(self._in_thread(self.leases.claim))
        try:
            job = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The thread goes on: what it claims is released with everything else of this owner.
            with contextlib.suppress(CodmdError):
                await claiming
            raise
        self._is_claiming = False
        if job is not None:
            try:
                self._begin(job)
            except (StorageFullError, StoreError) as error:
                logger.error("%s", error)
                await self._failed(job, _storage_failure(error))
            else:
                if job.id in self._early:  # between the claim and now
                    self.runner.cancel(job.id)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._wake.wait()

    def _begin(self, job: Job) -> None:
        path = self.ownership.place(job.id, job.params.format)
        queue_ms = 1000 * max(0.0, (job.started_at or job.created_at) - job.created_at)
        claimed_s = time.monotonic()
        waited_ms: list[float] = [queue_ms]

        def on_event(event: Event) -> None:
            if isinstance(event, Started):
                waited_ms[0] = queue_ms + 1000 * (time.monotonic() - claimed_s)
                self.hub.started(job.id, job.attempts)
            else:
                self.hub.progressed(job.id, event.stage, event.done, event.total, event.preview)

        request = JobRequest(
            id=job.id, params=job.params, path=path, is_previewed=job.is_preview, is_alone=job.is_alone
        )
        # Takes its place before this returns, so that the next claim sees the capacity that is left.
        outcome = self.runner.submit(request, on_event)
        task = asyncio.create_task(self._conclude(job, path, outcome, waited_ms))
        self._in_flight.add(job.id)
        self._concluding.add(task)
        task.add_done_callback(self._concluding.discard)

    async def _conclude(self, job: Job, path: Path, future: "asyncio.Future[Outcome]", waited_ms: list[float]) -> None:
        try:
            outcome = await future
            self._in_flight.discard(job.id)
            if isinstance(outcome, JobDone):
                await self._keep(job, path, outcome, waited_ms[0])
            elif isinstance(outcome, JobCancelled):
                await self._finish(job, Finished(status=CANCELLED))
            else:
                await self._failed(job, outcome)
        except Exception:  # the boundary of one job: the others go on, and its lease runs out
            logger.exception("job=%s outcome cannot be written", job.id)
        finally:
            await self._in_thread(shutil.rmtree, path.parent, ignore_errors=True)

    async def _keep(self, job: Job, path: Path, done: JobDone, queue_ms: float) -> None:
        """Store the video, then mark the job completed."""
        try:
            ttl_s, result_id = 3600.0 * self.config.result_hours, _result_id(self.ownership.owner, job.id)
            result = await self._in_thread(self.results.put, path, ttl_s, result_id)
        except StorageFullError as error:
            self._block("storage_full", str(error))
            await self._finish(job, Finished(status=FAILED, error_code="storage_full", error_message=str(error)))
            return
        except StoreError as error:
            self._block("storage_unwritable", str(error))
            await self._retry(job, JobFailed("storage_unwritable", str(error), True, counts_attempt=False))
            return
        finished = Finished(
            status=COMPLETED,
            timings_ms={"queue": queue_ms, **done.timings_ms},
            warnings=done.warnings,
            peak_memory_mb=done.peak_memory_mb or None,
            result=result,
        )
        if not await self._finish(job, finished):
            await self._in_thread(self.results.delete, result.name)

    async def _failed(self, job: Job, failed: JobFailed) -> None:
        if failed.code in STORAGE_CODES:
            self._block(failed.code, failed.message)
        if failed.is_retryable:
            await self._retry(job, failed)
        else:
            finished = Finished(status=FAILED, error_code=failed.code, error_message=failed.message)
            await self._finish(job, finished)

    async def _retry(self, job: Job, failed: JobFailed) -> None:
        is_charged = failed.counts_attempt
        if not is_charged and not self._is_stopping:
            self._uncharged[job.id] = self._uncharged.get(job.id, 0) + 1
            is_charged = self._uncharged[job.id] > MAX_UNCHARGED
        status = await self._persist(lambda: self.leases.retry(job.id, failed.message, failed.code, is_charged))
        logger.warning("job=%s attempt=%d code=%s status=%s", job.id, job.attempts, failed.code, status)
        if status in (FAILED, CANCELLED):
            self._concluded(job, Finished(status=status, error_code=failed.code, error_message=failed.message))
        else:
            self.hub.wake(job.id)
        self.wake()

    async def _finish(self, job: Job, finished: Finished) -> bool:
        is_written = await self._persist(lambda: self.leases.finish(job.id, finished, self.runner.facts))
        if is_written:
            self._concluded(job, finished)
        else:
            logger.warning("job=%s status=%s comes too late: another dispatcher has the job", job.id, finished.status)
        return is_written

    def _concluded(self, job: Job, finished: Finished) -> None:
        self._uncharged.pop(job.id, None)
        if self.on_finished is not None:
            self.on_finished(job, finished)
        data: dict[str, Any] = {"status": finished.status}
        if finished.status == FAILED:
            data["error"] = {"code": finished.error_code, "message": finished.error_message}
        self.hub.publish(job.id, "done" if finished.status == COMPLETED else finished.status, data)
        params = job.params
        stages = " ".join(f"{stage}_ms={value:.0f}" for stage, value in finished.timings_ms.items())
        logger.info(
            "job=%s status=%s shape=%dx%dx%d seed=%d attempt=%d %s",
            job.id,
            finished.status + (f" code={finished.error_code}" if finished.error_code else ""),
            params.width,
            params.height,
            params.num_frames,
            params.seed,
            job.attempts,
            stages,
        )

    async def _persist(self, write: Callable[[], Value]) -> Value:
        """Write to the store, retrying until it is back: the outcome of a job must not be lost."""
        while True:
            try:
                return await self._in_thread(write)
            except CodmdError as error:
                if self._is_stopping:
                    raise
                logger.error("%s; trying again", error)
                await asyncio.sleep(RETRY_S)

    # Storage that is full or gone: jobs stay in the queue

    def _block(self, code: str, reason: str) -> None:
        if not self.blocked:
            logger.error("no job is started until videos can be kept again: %s", reason)
        self.blocked, self.blocked_code = reason, code

    async def _check_results(self) -> None:
        try:
            await self._in_thread(self.results.check)
            await self._in_thread(self._check_spool)
        except StorageFullError as error:
            self._block("storage_full", str(error))
        except StoreError as error:
            self._block("storage_unwritable", str(error))
        else:
            if self.blocked:
                logger.warning("videos can be kept again")
            self.blocked = self.blocked_code = ""

    def _check_spool(self) -> None:
        ResultStore(str(self.ownership.spool)).check()

    # Beside the jobs

    async def _watch(self) -> None:
        """Extend leases, publish the served model, and apply cancellations that other processes wrote."""
        beat_s = self.config.lease_s / 3
        next_beat_s = 0.0
        was_ready = None
        while True:
            if time.monotonic() >= next_beat_s or was_ready != self.is_ready:
                next_beat_s, was_ready = time.monotonic() + beat_s, self.is_ready
                await self._beat()
            if self._in_flight:
                for job_id in await self._in_thread(self.leases.cancelled):
                    self.cancel(job_id)
            await asyncio.sleep(min(WATCH_S, beat_s))

    async def _beat(self) -> None:
        running = frozenset(self._in_flight)
        heartbeat = await self._in_thread(self.leases.heartbeat)
        for job_id in (running & self._in_flight) - heartbeat.held:
            logger.warning("job=%s lease was lost", job_id)
            self.cancel(job_id)
        facts = self.runner.facts
        service_s = 0.0
        if facts is not None:
            native = GenerateParams(
                prompt="", seed=0, height=facts.height, width=facts.width, num_frames=facts.num_frames, fps=1, crf=1
            )
            service_s = self.runner.service_s(native) or facts.service_s
        await self._in_thread(
            self.leases.announce,
            facts,
            self.runner.num_workers,
            self.is_ready,
            self.reason,
            service_s,
            float(self.config.lease_s),
        )

    async def _sweep(self) -> None:
        """Remove expired results, leases and files without a job."""
        next_leftovers_s = 0.0
        while True:
            if await self._in_thread(self.leases.expire_leases):
                self.wake()
            await self._in_thread(self._release_dead)
            await self._in_thread(self._expire)
            if time.monotonic() >= next_leftovers_s:
                next_leftovers_s = time.monotonic() + LEFTOVERS_S
                await self._in_thread(self._remove_leftovers)
            await asyncio.sleep(min(SWEEP_S, self.config.lease_s / 3))

    def _expire(self) -> None:
        names = self.store.expire(2**20 * self.config.result_max_mib, self.config.jobs_kept)
        for name in names:
            self.results.delete(name)
        if names:
            logger.info("results expired=%d", len(names))

    def _remove_leftovers(self) -> None:
        names = self.results.leftovers()
        for name in set(names) - self.store.has_result_named(names):
            self.results.delete(name)

    async def _deliver(self) -> None:
        """Send the webhooks that are due."""
        assert self.deliver is not None
        due = await self._in_thread(self.leases.due_webhooks)
        for job, attempts in due:
            is_delivered = await self.deliver(job)
            delays_s = (5.0, 30.0, 120.0, 600.0)
            is_given_up = is_delivered or attempts >= len(delays_s)
            retry_in_s = None if is_given_up else delays_s[attempts]
            logger.info("job=%s webhook delivered=%s calls=%d", job.id, is_delivered, attempts + 1)
            await self._in_thread(self.leases.webhook_done, job.id, retry_in_s)
        if not due:
            await asyncio.sleep(POLL_S)


def _storage_failure(error: StorageFullError | StoreError) -> JobFailed:
    """No fault of the job, which waits until there is room; the path stays in the log."""
    if isinstance(error, StorageFullError):
        return JobFailed("storage_full", "the server's disk is full", is_retryable=True, counts_attempt=False)
    message = "the server cannot write videos"
    return JobFailed("storage_unwritable", message, is_retryable=True, counts_attempt=False)


def _result_id(owner: str, job_id: str) -> str:
    """The id of the result that a dispatcher makes of a job: whoever sweeps after it knows what it may have left."""
    return hashlib.sha256(f"{owner} {job_id}".encode()).hexdigest()[:24]
