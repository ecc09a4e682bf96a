"""A bounded FIFO queue before the worker pool: tries lost jobs again, cancels, and remembers recent jobs.

A job that was running when a worker died is done again with nothing beside it, so that a second death has one suspect.
Knows nothing of HTTP, and nothing of torch.
"""

import asyncio
import bisect
import logging
import math
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from codmd_serve.config import GenerateParams, ModelFacts, ServeConfig
from codmd_serve.errors import GenerationError, QueueFullError
from codmd_serve.messages import Started
from codmd_serve.pool import (
    WORKER_COMMAND,
    Event,
    JobCancelled,
    JobDone,
    JobFailed,
    JobRequest,
    Outcome,
    WorkerPool,
)

# Where each stage begins and its share of the whole, roughly, for a bar that moves.
STAGE_PROGRESS = {"text": (0.0, 0.05), "denoise": (0.05, 0.65), "decode": (0.7, 0.25), "encode": (0.95, 0.05)}

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Job:
    """One request on its way; `status` goes queued, running and then to one of completed, failed, cancelled.

    Attributes:
        id: unguessable.
        number: its place in the order of arrival.
        params: what to make.
        path: where the worker puts the mp4.
        progress: 0..1, in all.
        attempts: workers that have started it, less those that died of another job.
        is_alone: whether nothing may run beside it: it was running when a worker died.
        finished: set when the status is final.
    """

    id: str
    number: int
    params: GenerateParams
    path: Path
    status: str = "queued"
    stage: str = ""
    progress: float = 0.0
    attempts: int = 0
    is_alone: bool = False
    is_cancel_requested: bool = False
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    finished_at: float | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: GenerationError | None = None
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class Dispatcher:
    """Owns the queue, the pool and the record of recent jobs. Lives on one event loop.

    Args:
        config: queue bound, attempts, what the workers shall load.
        command: starts a worker; tests have one of their own.
        on_ready: called when the first worker is warm.
        on_fatal: called with one sentence when the first worker cannot load; nothing will ever run then.
    """

    def __init__(
        self,
        config: ServeConfig,
        command: Sequence[str] = WORKER_COMMAND,
        on_ready: Callable[[ModelFacts], None] | None = None,
        on_fatal: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.pool = WorkerPool(config, command, on_ready, on_fatal, self._on_pool_change)
        self._queue: list[Job] = []
        self._sent: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._num_submitted = 0
        self._spool: Path | None = None
        self._is_stopping = False

    @property
    def facts(self) -> ModelFacts | None:
        """Of the engine; None until the first worker is warm."""
        return self.pool.facts

    @property
    def is_ready(self) -> bool:
        """Whether some worker is warm, and none hangs."""
        return self.pool.is_ready and not self.pool.num_hanging

    @property
    def num_restarts(self) -> int:
        """Worker deaths so far."""
        return self.pool.restarts.total()

    @property
    def running(self) -> Job | None:
        """The job that runs, of several the one that started first."""
        return next((job for job in self._sent if job.status == "running"), None)

    @property
    def waiting(self) -> list[Job]:
        """Jobs that have not started, in their order, wherever they wait."""
        return [job for job in self._sent if job.status == "queued"] + self._queue

    async def start(self) -> None:
        """Start the workers in the background; returns at once."""
        self._spool = Path(tempfile.mkdtemp(prefix="codmd-serve-"))
        await self.pool.start()

    async def stop(self) -> None:
        """End the workers, fail what is not finished, remove the files."""
        self._is_stopping = True
        await self.pool.stop()
        self._fail_queued(GenerationError("the server is shutting down", "shutting_down"))
        while self._sent:  # outcomes are told by callbacks, which are about to run
            await asyncio.sleep(0)
        if self._spool is not None:
            shutil.rmtree(self._spool, ignore_errors=True)

    def submit(self, params: GenerateParams) -> Job:
        """Queue a job.

        Raises:
            QueueFullError: the queue is at its bound; says when to come back.
        """
        num_waiting = len(self.waiting)
        if num_waiting >= self.config.queue_size:
            num_ahead = num_waiting + (self.running is not None)
            retry_after_s = max(1, math.ceil(self.pool.service_s(params) * num_ahead))
            raise QueueFullError(f"{num_waiting} jobs are waiting already, no more are taken", retry_after_s)
        assert self._spool is not None
        job_id = secrets.token_hex(12)
        self._num_submitted += 1
        job = Job(id=job_id, number=self._num_submitted, params=params, path=self._spool / job_id / "video.mp4")
        self._jobs[job.id] = job
        self._forget_old_jobs()
        self._queue.append(job)
        self._send_jobs()
        return job

    def job(self, job_id: str) -> Job | None:
        """A recent job, finished or not; None for one never seen or forgotten."""
        return self._jobs.get(job_id)

    def cancel(self, job: Job) -> None:
        """Give a job up: at once while it waits, between two steps or decoded chunks while it runs.

        One that was sent ahead is given up as soon as the worker has handed it back.
        """
        if job.finished.is_set():
            return
        job.is_cancel_requested = True
        if job in self._queue:
            self._queue.remove(job)
            self._finish(job, "cancelled")
        else:
            self.pool.cancel(job.id)

    def _forget_old_jobs(self) -> None:
        surplus = len(self._jobs) - self.config.jobs_kept
        finished = (job_id for job_id, job in self._jobs.items() if job.finished.is_set())
        for job_id in [job_id for job_id, _ in zip(finished, range(surplus), strict=False)]:
            del self._jobs[job_id]

    def _on_pool_change(self) -> None:
        if self.pool.load_error:
            self._fail_queued(GenerationError(self.pool.load_error, "worker_died"))
        self._send_jobs()

    def _send_jobs(self) -> None:
        """Hand the pool the jobs that it has places for."""
        while self._queue and self.pool.capacity and not self._is_stopping:
            job = self._queue.pop(0)
            self._sent.append(job)
            request = JobRequest(id=job.id, params=job.params, path=job.path, is_alone=job.is_alone)
            outcome = self.pool.submit(request, partial(self._on_event, job))
            outcome.add_done_callback(partial(self._on_outcome, job))

    def _on_event(self, job: Job, event: Event) -> None:
        if isinstance(event, Started):
            job.status, job.started_at = "running", time.time()
            job.attempts += 1
        else:
            begin, share = STAGE_PROGRESS[event.stage]
            job.stage, job.progress = event.stage, begin + share * event.done / event.total

    def _on_outcome(self, job: Job, future: "asyncio.Future[Outcome]") -> None:
        self._sent.remove(job)
        outcome = future.result()
        if isinstance(outcome, JobFailed):  # one that has started was counted then
            job.attempts += outcome.counts_attempt - (job.status == "running")
        if isinstance(outcome, JobDone):
            self._complete(job, outcome)
        elif isinstance(outcome, JobCancelled) or job.is_cancel_requested:
            self._finish(job, "cancelled")
        elif outcome.is_retryable and job.attempts < self.config.max_attempts and not self._is_stopping:
            self._try_again(job)
        else:
            message = f"the worker died {job.attempts} times on this job, perhaps for want of memory"
            is_last_attempt = outcome.is_retryable and outcome.counts_attempt
            job.error = GenerationError(message if is_last_attempt else outcome.message, outcome.code)
            self._finish(job, "failed")
        self._send_jobs()

    def _complete(self, job: Job, outcome: JobDone) -> None:
        assert job.started_at is not None
        job.timings_ms = {"queue": 1000 * (job.started_at - job.created_at), **outcome.timings_ms}
        job.warnings, job.progress = outcome.warnings, 1.0
        self._finish(job, "cancelled" if job.is_cancel_requested else "completed")

    def _try_again(self, job: Job) -> None:
        """Put a job that a worker lost back to its place in the queue."""
        logger.warning("job=%s attempt=%d worker died, trying again", job.id, job.attempts)
        self._remove_files(job)
        job.is_alone = job.status == "running"
        job.status, job.stage, job.progress = "queued", "", 0.0
        bisect.insort(self._queue, job, key=lambda each: each.number)

    def _finish(self, job: Job, status: str) -> None:
        if status != "completed":
            self._remove_files(job)
        job.status, job.finished_at = status, time.time()
        job.finished.set()
        shape = f"{job.params.width}x{job.params.height}x{job.params.num_frames}"
        stages = " ".join(f"{stage}_ms={value:.0f}" for stage, value in job.timings_ms.items())
        logger.info("job=%s status=%s shape=%s seed=%d %s", job.id, status, shape, job.params.seed, stages)

    def _remove_files(self, job: Job) -> None:
        """Remove the video and what a killed worker had begun of it."""
        shutil.rmtree(job.path.parent, ignore_errors=True)

    def _fail_queued(self, error: GenerationError) -> None:
        while self._queue:
            job = self._queue.pop(0)
            job.error = error
            self._finish(job, "failed")
