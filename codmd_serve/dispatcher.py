"""The bounded queue before the one worker process: jobs in order, ahead where that pays; supervises, retries, cancels.

A job is at the worker from when it is sent to when the worker has said what became of it. Without overlap one job is
there. With overlap there are up to three: one that is being encoded, one on the device, and one that has not started,
whose prompt is embedded meanwhile. A job that was running when a worker died is done again with nothing beside it, so
that a second death has one suspect.

Knows nothing of HTTP, and nothing of torch: it survives whatever happens to the device.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import shutil
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codmd_serve.config import ENGINE_SETTINGS, GenerateParams, ModelFacts, ServeConfig
from codmd_serve.errors import CodmdError, GenerationError, QueueFullError
from codmd_serve.messages import (
    MAX_MESSAGE_BYTES,
    Cancel,
    Cancelled,
    Done,
    Failed,
    Fatal,
    FromWorker,
    Generate,
    JobMessage,
    Load,
    Progress,
    Ready,
    Started,
    ToWorker,
    decode,
    encode,
)

WORKER_COMMAND = (sys.executable, "-P", "-m", "codmd_serve.worker")
MAX_BACKOFF_S = 30.0
# Where each stage begins and how much of the whole it is, roughly, for a bar that moves.
STAGE_PROGRESS = {"text": (0.0, 0.05), "denoise": (0.05, 0.65), "decode": (0.7, 0.3)}
SERVICE_TIME_WEIGHT = 0.3

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Job:
    """One request on its way; `status` goes queued, running and then to one of completed, failed, cancelled.

    Args:
        id: unguessable.
        params: what to make.
        path: where the worker puts the mp4.
        progress: 0..1, in all.
        attempts: workers that have started it, less those that died of another job.
        is_alone: whether nothing may run beside it: it was running when a worker died.
        finished: set when the status is final.
    """

    id: str
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
    """Owns the queue, the worker process and the record of recent jobs. Lives on one event loop.

    Args:
        config: queue bound, attempts, what the worker shall load.
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
        self.facts: ModelFacts | None = None
        self.is_ready = False
        self.num_restarts = 0
        self._queue: deque[Job] = deque()
        self._sent: list[Job] = []
        self._command = command
        self._on_ready = on_ready
        self._on_fatal = on_fatal
        self._jobs: dict[str, Job] = {}
        self._service_s = 0.0
        self._last_done_at = 0.0
        self._process: Process | None = None
        self._spool: Path | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> Job | None:
        """The job that runs, of several the one that started first."""
        return next((job for job in self._sent if job.status == "running"), None)

    @property
    def waiting(self) -> list[Job]:
        """Jobs that have not started, in their order, wherever they wait."""
        return [job for job in self._sent if job.status == "queued"] + list(self._queue)

    async def start(self) -> None:
        """Start the worker in the background; returns at once."""
        self._spool = Path(tempfile.mkdtemp(prefix="codmd-serve-"))
        self._task = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the worker, fail what is not finished, remove the files."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._end_worker()  # again: the task may have been doing just that when it was cancelled
        self._fail_all(GenerationError("the server is shutting down", "shutting_down"))
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
            retry_after_s = max(1, math.ceil(self._service_s * num_ahead))
            raise QueueFullError(f"{num_waiting} jobs are waiting already, no more are taken", retry_after_s)
        assert self._spool is not None
        job_id = secrets.token_hex(12)
        job = Job(id=job_id, params=params, path=self._spool / f"{job_id}.mp4")
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
            self._send(Cancel(job.id))

    def _forget_old_jobs(self) -> None:
        surplus = len(self._jobs) - self.config.jobs_kept
        finished = (job_id for job_id, job in self._jobs.items() if job.finished.is_set())
        for job_id in [job_id for job_id, _ in zip(finished, range(surplus), strict=False)]:
            del self._jobs[job_id]

    async def _supervise(self) -> None:
        num_failures = 0
        while True:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=PIPE, stdout=PIPE, limit=MAX_MESSAGE_BYTES, start_new_session=True
                )
                await self._load()
                num_failures = 0
                self._send_jobs()
                while (message := await self._receive()) is not None:
                    if isinstance(message, JobMessage):
                        self._on_message(message)
            except (CodmdError, OSError) as error:
                if self.facts is None:
                    if self._on_fatal is not None:
                        self._on_fatal(str(error))
                    return
                log.error("worker cannot load: %s", error)
                # One that was killed while it loaded may do better the next time; what waits can wait for that.
                is_killed = isinstance(error, GenerationError) and error.code == "worker_died"
                if not is_killed or num_failures >= self.config.max_attempts:
                    self._fail_all(GenerationError(f"the worker cannot be restarted: {error}", "worker_died"))
            finally:
                self.is_ready = False
                await self._end_worker()
            self._take_back()
            self.num_restarts += 1
            exit_code = self._process.returncode if self._process else None
            log.warning("worker exit_code=%s restarts=%d", exit_code, self.num_restarts)
            await asyncio.sleep(min(MAX_BACKOFF_S, 2.0**num_failures - 1.0))
            num_failures += 1

    async def _load(self) -> None:
        settings = {name: getattr(self.config, name) for name in ENGINE_SETTINGS}
        self._send(Load(self.config.bundle, settings))
        message = await self._receive()
        if message is None:
            raise GenerationError("the worker process ended while loading; its own words are above", "worker_died")
        if isinstance(message, Fatal):
            raise GenerationError(message.message, "worker_fatal")
        if not isinstance(message, Ready):
            raise GenerationError(f"the worker said {message} instead of being ready", "worker_died")
        is_first = self.facts is None
        self.facts = message.facts
        self._service_s = self._service_s or self.facts.service_s
        self.is_ready = True
        if is_first and self._on_ready is not None:
            self._on_ready(self.facts)

    def _send_jobs(self) -> None:
        """Hand the worker the jobs that it may have by now."""
        while self.is_ready and self._queue and self._may_send(self._queue[0]):
            job = self._queue.popleft()
            if not self._sent:
                self._begin(job)
            self._sent.append(job)
            self._send(Generate(job.id, str(job.path), job.params))

    def _may_send(self, job: Job) -> bool:
        if not self._sent:
            return True
        is_one_waiting = any(other.status == "queued" for other in self._sent)
        return self._overlaps() and not is_one_waiting and not any(each.is_alone for each in (job, *self._sent))

    def _overlaps(self) -> bool:
        # On a CPU encoder and engine would only take cores from each other.
        is_gpu = self.facts is not None and self.facts.device != "cpu"
        return self.config.overlap == "on" or (self.config.overlap == "auto" and is_gpu)

    def _begin(self, job: Job) -> None:
        if job.status == "queued":
            job.status, job.started_at = "running", time.time()
            job.attempts += 1

    def _on_message(self, message: JobMessage) -> None:
        """Take in one message about a job that was sent."""
        job = next((job for job in self._sent if job.id == message.id), None)
        if job is None:
            log.warning("worker message=%s is about no job that it has", message)
            return
        if isinstance(message, Started):
            self._begin(job)
        elif isinstance(message, Progress):
            begin, share = STAGE_PROGRESS[message.stage]
            job.stage, job.progress = message.stage, begin + share * message.done / message.total
        else:
            self._sent.remove(job)
            self._on_last_message(job, message)
        self._send_jobs()

    def _on_last_message(self, job: Job, message: Done | Failed | Cancelled) -> None:
        status = "cancelled"
        if isinstance(message, Done):
            status = "completed"
            assert job.started_at is not None
            queue_ms = 1000 * (job.started_at - job.created_at)
            job.timings_ms = {"queue": queue_ms, **message.timings_ms}
            job.warnings = message.warnings
            job.progress = 1.0
            # What the next one waits for: the time that two jobs had in common counts once.
            took_s = time.time() - max(job.started_at, self._last_done_at)
            self._service_s += SERVICE_TIME_WEIGHT * (took_s - self._service_s)
            self._last_done_at = time.time()
        elif isinstance(message, Failed):
            status, job.error = "failed", GenerationError(message.message, message.code)
        self._finish(job, status)

    def _take_back(self) -> None:
        """Put what a dead worker had back to the head of the queue, in its order, as far as it may be tried again."""
        sent, self._sent = self._sent, []
        started = [job for job in sent if job.status == "running"]
        for job in started[:-1]:
            job.attempts -= 1  # only its encoder was left: the death counts against the job that had the device
        for job in reversed(sent):
            if job.is_cancel_requested:
                self._finish(job, "cancelled")
            elif job.attempts < self.config.max_attempts:
                log.warning("job=%s attempt=%d worker died, trying again", job.id, job.attempts)
                self._remove_files(job)
                job.is_alone = job in started
                job.status, job.stage, job.progress = "queued", "", 0.0
                self._queue.appendleft(job)
            else:
                message = f"the worker died {job.attempts} times on this job, perhaps for want of memory"
                job.error = GenerationError(message, "worker_died")
                self._finish(job, "failed")

    def _finish(self, job: Job, status: str) -> None:
        if job.is_cancel_requested:
            status = "cancelled"
        if status != "completed":
            self._remove_files(job)
        job.status, job.finished_at = status, time.time()
        job.finished.set()
        shape = f"{job.params.width}x{job.params.height}x{job.params.num_frames}"
        stages = " ".join(f"{stage}_ms={value:.0f}" for stage, value in job.timings_ms.items())
        log.info("job=%s status=%s shape=%s seed=%d %s", job.id, status, shape, job.params.seed, stages)

    def _remove_files(self, job: Job) -> None:
        """Remove the video and what a killed worker had begun of it."""
        for path in job.path.parent.glob(f"*{job.id}*"):
            path.unlink(missing_ok=True)

    def _fail_all(self, error: GenerationError) -> None:
        unfinished = [*self._sent, *self._queue]
        self._sent.clear()
        self._queue.clear()
        for job in unfinished:
            job.error = error
            self._finish(job, "failed")

    def _send(self, message: ToWorker) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(encode(message))

    async def _receive(self) -> FromWorker | None:
        """The next message of the worker; None when it is gone, also in the middle of a line, or talks nonsense."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
            if not line.endswith(b"\n"):
                return None
            message = decode(line)
            if isinstance(message, ToWorker):
                raise ValueError(f"a worker does not say {message}")
        except ValueError as error:
            log.error("worker sent what is no message: %s", error)
            return None
        return message

    async def _end_worker(self) -> None:
        """Kill a worker that may be dead already, and collect it. It keeps nothing that a gentler end would save."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        # Not wait(): that leaves the pipes to the garbage collector.
        await self._process.communicate(b"")
