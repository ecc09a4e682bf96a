"""A place of the pool for one worker process after the other: its jobs in flight, and whether it hangs.

Also the types by which the pool's callers speak of jobs. No policy about which worker gets a job.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from codmd_serve.config import GenerateParams
from codmd_serve.errors import GenerationError
from codmd_serve.messages import DEVICE_ERROR, Alive, Fatal, Generate, Load, Progress, Ready, Started
from codmd_serve.service_time import ServiceTimes
from codmd_serve.worker_process import MAX_DYING_S, WorkerProcess

# A worker sends a heartbeat every second. Silence of the first length closes /ready, of the second gets it killed.
SUSPECT_SILENCE_S = 5.0
MAX_SILENCE_S = 20.0
# While it loads, a library may hold the interpreter for long, for example to read gigabytes from a cold disk.
MAX_LOAD_SILENCE_S = 600.0

logger = logging.getLogger(__name__)

Event = Started | Progress
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """A job to run once.

    Attributes:
        id: unique among the jobs in flight.
        params: what to make; the seed is resolved.
        path: where the mp4 goes; it appears whole or not at all.
        is_previewed: whether Progress of a denoising step carries a preview.
        is_alone: whether nothing may be in flight beside it: it was running when a worker died, and a second death
            shall have one suspect.
    """

    id: str
    params: GenerateParams
    path: Path
    is_previewed: bool = False
    is_alone: bool = False


@dataclass(frozen=True, slots=True)
class JobDone:
    """The mp4 is at its path. Fields as in messages.Done."""

    timings_ms: dict[str, float]
    warnings: list[str]
    peak_memory_mb: float


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job did not end well; a partial file of a killed worker may lie beside its path.

    Attributes:
        code: stable machine-readable word: out_of_memory, storage_full, worker_died, worker_hung, device_error,
            shutting_down ...
        message: one sentence for the client.
        is_retryable: whether another try may go better: the worker failed, not the job.
        counts_attempt: whether this counts as an attempt of this job. False when the fault was another job's or the
            server's.
    """

    code: str
    message: str
    is_retryable: bool = False
    counts_attempt: bool = True


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """The job was given up on request; nothing is at its path."""


Outcome = JobDone | JobFailed | JobCancelled


@dataclass(slots=True, eq=False)
class InFlight:
    """A job from `submit` to its outcome. Times are of time.monotonic.

    Attributes:
        is_encoding: whether its last frame is decoded, so that only the encoder is left.
    """

    job: JobRequest
    on_event: OnEvent
    outcome: "asyncio.Future[Outcome]"
    started_s: float | None = None
    last_event_s: float = 0.0
    cancelled_s: float | None = None
    is_encoding: bool = False

    def settle(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


@dataclass(frozen=True, slots=True)
class WatchdogLimits:
    """Seconds that a worker gets at least before the watchdog kills it.

    Attributes:
        cancel_s: to obey a cancellation.
        stall_s: for progress of a job, beside a multiple of what the job is expected to take.
    """

    cancel_s: float
    stall_s: float


@dataclass(slots=True, eq=False)
class WorkerSlot:
    """One worker process and its jobs. Times are of time.monotonic.

    Attributes:
        index: of the worker.
        settings: keyword arguments of `load_engine` for its device.
        process: the present one.
        is_ready: whether its engine is warm.
        ready_s: when it became so.
        in_flight: jobs that were sent, in order.
        last_done_s: when it last finished a job.
        end_reason: why the pool killed the process; empty when it ended by itself.
        killed_s: when it did.
        suspect: the job that made the pool kill it.
    """

    index: int
    settings: dict[str, object]
    process: WorkerProcess | None = None
    is_ready: bool = False
    ready_s: float = 0.0
    in_flight: list[InFlight] = field(default_factory=list)
    last_done_s: float = 0.0
    end_reason: str = ""
    killed_s: float = 0.0
    suspect: InFlight | None = None

    async def load(self, bundle: str) -> Ready:
        """Have the process load its engine; returns when it is warm.

        Raises:
            GenerationError: code worker_fatal when the engine cannot be loaded, worker_died when the process ended.
        """
        assert self.process is not None
        self.process.heard_s = time.monotonic()
        self.process.send(Load(bundle, self.settings))
        message = await self.process.receive()
        while isinstance(message, Alive):
            message = await self.process.receive()
        if message is None:
            raise GenerationError("the worker process ended while loading; its own words are above", "worker_died")
        if isinstance(message, Fatal):
            raise GenerationError(message.message, "worker_fatal")
        if not isinstance(message, Ready):
            raise GenerationError(f"the worker sent {message} instead of being ready", "worker_died")
        self.is_ready, self.ready_s = True, time.monotonic()
        return message

    def may_send(self, job: JobRequest | None, is_overlapping: bool) -> bool:
        """Whether a job may be sent now; None is one that may have others beside it."""
        if not self.is_ready or self.end_reason:
            return False
        if not self.in_flight:
            return True
        is_one_waiting = any(entry.started_s is None for entry in self.in_flight)
        is_any_alone = any(entry.job.is_alone for entry in self.in_flight) or (job is not None and job.is_alone)
        return is_overlapping and not is_one_waiting and not is_any_alone

    def send(self, entry: InFlight) -> None:
        """Send a job."""
        assert self.process is not None
        self.in_flight.append(entry)
        entry.last_event_s = time.monotonic()
        job = entry.job
        self.process.send(Generate(job.id, str(job.path), job.params, job.is_previewed))

    def kill(self, reason: str, suspect: InFlight | None = None) -> None:
        """Kill the process; the first reason stays."""
        if self.process is not None and not self.end_reason:
            logger.error("worker=%d killed reason=%s job=%s", self.index, reason, suspect.job.id if suspect else "")
            self.end_reason, self.killed_s, self.suspect = reason, time.monotonic(), suspect
            self.process.kill()

    def hangs(self, limits: WatchdogLimits, times: ServiceTimes) -> bool:
        """Whether it is silent, or a job of it has made no progress for half the time that is granted."""
        now_s = time.monotonic()
        is_silent = self.process is not None and now_s - self.process.heard_s > SUSPECT_SILENCE_S
        return is_silent or any(self._stalled_share(entry, limits, times, now_s) > 0.5 for entry in self.in_flight)

    def kill_if_hung(self, limits: WatchdogLimits, times: ServiceTimes | None) -> None:
        """Kill the process when it, or a job of it, is past a limit."""
        now_s = time.monotonic()
        if self.end_reason and now_s - self.killed_s > MAX_DYING_S:
            # A driver may keep a process from dying for minutes; its jobs do not wait for that.
            self.settle_lost_jobs(self.end_reason)
        if self.process is None or self.process.exit_code is not None or self.end_reason:
            return
        if now_s - self.process.heard_s > (MAX_SILENCE_S if self.is_ready else MAX_LOAD_SILENCE_S):
            self.kill("silent")
            return
        for entry in self.in_flight:
            reason = self._overdue(entry, limits, times, now_s)
            if reason:
                self.kill(reason, entry)

    def _overdue(self, entry: InFlight, limits: WatchdogLimits, times: ServiceTimes | None, now_s: float) -> str:
        """Which limit a job is past; empty when none."""
        if entry.cancelled_s is not None and now_s - entry.cancelled_s > limits.cancel_s:
            return "cancel_timeout"
        if times is None:
            return ""
        if self._stalled_share(entry, limits, times, now_s) > 1.0:
            return "stalled"
        started_s = now_s if entry.started_s is None else entry.started_s
        deadline_s = times.deadline_s(entry.job.params, 2.0 * limits.stall_s, entry.is_encoding)
        return "deadline" if now_s - started_s > deadline_s else ""

    def _stalled_share(self, entry: InFlight, limits: WatchdogLimits, times: ServiceTimes, now_s: float) -> float:
        """Time without progress of a job that should make some, as a share of what is granted."""
        if entry.started_s is None and entry is not self.in_flight[0]:
            return 0.0
        since_s = max(entry.last_event_s, self.last_done_s if entry.started_s is None else 0.0)
        return (now_s - since_s) / times.stall_s(entry.job.params, limits.stall_s, entry.is_encoding)

    def forgive(self, lag_s: float) -> None:
        """Let a time not count in which the pool itself stood still."""
        if self.process is not None:
            self.process.heard_s += lag_s
        for entry in self.in_flight:
            entry.last_event_s += lag_s
            entry.started_s = None if entry.started_s is None else entry.started_s + lag_s
            entry.cancelled_s = None if entry.cancelled_s is None else entry.cancelled_s + lag_s

    def settle_lost_jobs(self, reason: str) -> None:
        """End the jobs of a process that died; the attempt counts for those that it may have died of."""
        lost, self.in_flight = self.in_flight, []
        started = [entry for entry in lost if entry.started_s is not None]
        # Those that are being encoded had left the device; it had the others, up to two. Where none has said that it
        # started, the first may be what the process died of.
        on_device = [entry for entry in started if not entry.is_encoding] or started[-1:] or lost[:1]
        suspects = [self.suspect] if self.suspect is not None else on_device
        code = "worker_died" if reason in ("died", DEVICE_ERROR) else "worker_hung"
        what = "died, perhaps for want of memory" if code == "worker_died" else "made no progress and was killed"
        for entry in lost:
            is_suspect = entry in suspects
            message = f"the worker {what}" if is_suspect else "the worker was lost to another job"
            failed = JobFailed(code, message, is_retryable=True, counts_attempt=is_suspect)
            entry.settle(JobCancelled() if entry.cancelled_s is not None else failed)
