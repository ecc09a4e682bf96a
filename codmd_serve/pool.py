"""Worker processes and their supervision: starts them, gives them jobs, kills what hangs, replaces what died.

Each worker owns one device. A job goes to the ready worker with the fewest jobs in flight. Without overlap a worker has
one job in flight. With overlap it has up to three: one that is decoded or encoded, one that is denoised, and one that
has not started, whose prompt is embedded meanwhile. The pool never tries a job again: the caller does, and is told
whether the attempt counts.

Knows nothing of HTTP, of the job store, and of torch: it survives whatever happens to a device.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from codmd_serve.config import ENGINE_SETTINGS, GenerateParams, ModelFacts, ServeConfig
from codmd_serve.cpu import usable_cpus
from codmd_serve.errors import CodmdError, GenerationError
from codmd_serve.messages import DEVICE_ERROR, Cancel, Cancelled, Done, Failed, JobMessage, Progress, Ready, Started
from codmd_serve.service_time import ServiceTimes
from codmd_serve.worker_process import WORKER_COMMAND, WorkerProcess
from codmd_serve.worker_slot import (
    Event,
    InFlight,
    JobCancelled,
    JobDone,
    JobFailed,
    JobRequest,
    OnEvent,
    Outcome,
    WatchdogLimits,
    WorkerSlot,
)

__all__ = ["Event", "JobCancelled", "JobDone", "JobFailed", "JobRequest", "OnEvent", "Outcome", "WorkerPool"]

MAX_BACKOFF_S = 30.0
# Codes of failures whose fault is not the job's; the attempt counts all the same.
RETRYABLE = (DEVICE_ERROR, "encoder_hung")
WATCH_EVERY_S = 0.25
# A spare imports for many CPU seconds, which the first requests need more: it starts when the workers are idle.
SPARE_DELAY_S = 5.0
MAX_SPARE_DELAY_S = 60.0

logger = logging.getLogger(__name__)


class WorkerPool:
    """Owns the worker processes. Lives on one event loop; every method but `run`, `start`, `stop` returns at once.

    Args:
        config: what the workers load, how many there are, and their limits.
        command: starts a worker; tests have one of their own.
        on_ready: called when the first worker is warm.
        on_fatal: called with one sentence when the first worker cannot load; nothing will ever run then.
        on_change: called when `capacity`, `is_ready` or `load_error` may have changed.
        spare: a process of `command` on this event loop, for the first worker; None starts one.

    Attributes:
        facts: of the engine; None until the first worker is warm.
        load_error: why no worker can be started at present, though that is tried again; empty when some can.
        restarts: worker deaths by reason: died, silent, stalled, deadline, cancel_timeout, device_error, load.
    """

    def __init__(
        self,
        config: ServeConfig,
        command: Sequence[str] = WORKER_COMMAND,
        on_ready: Callable[[ModelFacts], None] | None = None,
        on_fatal: Callable[[str], None] | None = None,
        on_change: Callable[[], None] | None = None,
        spare: WorkerProcess | None = None,
    ) -> None:
        self.config = config
        self.facts: ModelFacts | None = None
        self.load_error = ""
        self.restarts: Counter[str] = Counter()
        self._command, self._on_ready, self._on_fatal, self._on_change = command, on_ready, on_fatal, on_change
        self._limits = WatchdogLimits(cancel_s=config.cancel_timeout_s, stall_s=config.stall_timeout_s)
        self._times: ServiceTimes | None = None
        self._slots: list[WorkerSlot] = []
        self._pending: deque[InFlight] = deque()
        self._spare = spare
        self._tasks: list[asyncio.Task[None]] = []
        self._has_capacity = asyncio.Event()
        self._refusal: JobFailed | None = None

    async def start(self) -> None:
        """Start the first worker in the background; the others follow when it is warm. Returns at once."""
        self._add_slot(self.config.device)
        self._tasks.append(asyncio.create_task(self._watch()))

    async def stop(self, drain_s: float = 0.0) -> None:
        """Take no more jobs, give those in flight `drain_s` seconds to end, then kill the workers.

        What is in flight after that ends as JobFailed with code shutting_down, which counts no attempt.
        """
        self._refuse(JobFailed("shutting_down", "the server is shutting down", is_retryable=True, counts_attempt=False))
        in_flight = [entry.outcome for slot in self._slots for entry in slot.in_flight]
        if in_flight and drain_s > 0:
            await asyncio.wait(in_flight, timeout=drain_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Again: a task may have been ending its process when it was cancelled.
        processes = [slot.process for slot in self._slots] + [self._spare]
        await asyncio.gather(*(process.end() for process in processes if process is not None))
        for slot in self._slots:
            slot.is_ready = False
            while slot.in_flight:
                assert self._refusal is not None
                slot.in_flight.pop().settle(self._refusal)

    async def run(self, job: JobRequest, on_event: OnEvent) -> Outcome:
        """Run a job once, as soon as there is a place. Cancelling the task that awaits this cancels the job.

        Args:
            job: its id is not in flight.
            on_event: is given Started when the device begins, then Progress, in order; called on the event loop.
        """
        try:
            return await self.submit(job, on_event)
        except asyncio.CancelledError:
            self.cancel(job.id)
            raise

    def submit(self, job: JobRequest, on_event: OnEvent) -> "asyncio.Future[Outcome]":
        """As `run`, but takes the place at once, so that `capacity` is right when this returns."""
        entry = InFlight(job, on_event, asyncio.get_running_loop().create_future())
        if self._refusal is not None:
            entry.settle(self._refusal)
        else:
            self._pending.append(entry)
            self._place_jobs()
        return entry.outcome

    def cancel(self, job_id: str) -> None:
        """Give a job up: at once when it has no place yet, else within one denoising step or decoded chunk.

        A worker that does not obey within config.cancel_timeout_s is killed. The outcome is JobCancelled, or JobDone
        when the job was faster. An unknown id is ignored.
        """
        for entry in [entry for entry in self._pending if entry.job.id == job_id]:
            self._pending.remove(entry)
            entry.settle(JobCancelled())
        for slot in self._slots:
            for entry in slot.in_flight:
                if entry.job.id == job_id and entry.cancelled_s is None and slot.process is not None:
                    entry.cancelled_s = time.monotonic()
                    slot.process.send(Cancel(job_id))
        self._place_jobs()

    @property
    def is_ready(self) -> bool:
        """Whether some worker is warm and does not hang."""
        return any(slot.is_ready and not self._hangs(slot) for slot in self._slots)

    @property
    def num_workers(self) -> int:
        """Workers that are warm."""
        return sum(slot.is_ready for slot in self._slots)

    @property
    def num_hanging(self) -> int:
        """Warm workers that are silent or whose job makes no progress; the watchdog will kill them."""
        return sum(slot.is_ready and self._hangs(slot) for slot in self._slots)

    @property
    def spare_pid(self) -> int | None:
        """Process id of the spare; None while there is none."""
        return self._spare.pid if self._spare is not None and self._spare.exit_code is None else None

    @property
    def num_waiting(self) -> int:
        """Jobs that have no place yet."""
        return len(self._pending)

    @property
    def capacity(self) -> int:
        """Jobs that would be sent to a worker at once."""
        return max(0, sum(slot.may_send(None, self._overlaps()) for slot in self._slots) - len(self._pending))

    async def wait_for_capacity(self) -> None:
        """Return when `capacity` is above 0."""
        await self._has_capacity.wait()

    def service_s(self, params: GenerateParams) -> float:
        """Seconds that a job is expected to take, from those that were done; 0 while no engine is loaded."""
        return self._times.expected_s(params) if self._times is not None else 0.0

    def seconds_to_place(self) -> float:
        """Seconds until a place frees: of the job that ends first, or of the worker that is ready again first."""
        if self.capacity or self.facts is None:
            return 0.0
        return min((self._seconds_to_place(slot) for slot in self._slots), default=0.0)

    def _seconds_to_place(self, slot: WorkerSlot) -> float:
        now_s = time.monotonic()
        if not slot.is_ready:
            assert self.facts is not None
            return self.facts.load_s
        running = [entry for entry in slot.in_flight if entry.started_s is not None]
        if not running:
            return 0.0
        first = running[0]
        assert first.started_s is not None
        return max(0.0, first.started_s + self.service_s(first.job.params) - now_s)

    def _hangs(self, slot: WorkerSlot) -> bool:
        return self._times is not None and slot.hangs(self._limits, self._times)

    # Placing jobs and taking in what becomes of them.

    def _overlaps(self) -> bool:
        # On a CPU encoder and engine would only take cores from each other.
        is_gpu = self.facts is not None and self.facts.device != "cpu"
        return self.config.overlap == "on" or (self.config.overlap == "auto" and is_gpu)

    def _place_jobs(self) -> None:
        """Send the workers what they may have by now, the oldest job first, to the least loaded."""
        while self._pending:
            free = [slot for slot in self._slots if slot.may_send(self._pending[0].job, self._overlaps())]
            if not free:
                break
            least = min(free, key=lambda slot: (len(slot.in_flight), slot.index))
            least.send(self._pending.popleft())
        if self.capacity:
            self._has_capacity.set()
        else:
            self._has_capacity.clear()
        if self._on_change is not None:
            self._on_change()

    def _on_message(self, slot: WorkerSlot, message: JobMessage) -> None:
        entry = next((entry for entry in slot.in_flight if entry.job.id == message.id), None)
        if entry is None:
            logger.warning("worker=%d message=%s is about no job in flight", slot.index, message)
            return
        now_s = time.monotonic()
        entry.last_event_s = now_s
        if isinstance(message, Started | Progress):
            if isinstance(message, Started):
                entry.started_s = now_s
            elif message.stage in ("decode", "encode") and message.done >= message.total:
                entry.is_encoding = True
            try:
                entry.on_event(message)
            except Exception:  # the caller's own fault: neither the job nor the worker shall pay for it
                logger.exception("job=%s event=%s", message.id, type(message).__name__)
        else:
            slot.in_flight.remove(entry)
            entry.settle(self._outcome(slot, entry, message))
            slot.last_done_s = now_s
        self._place_jobs()

    def _outcome(self, slot: WorkerSlot, entry: InFlight, message: Done | Failed | Cancelled) -> Outcome:
        if isinstance(message, Cancelled):
            return JobCancelled()
        if isinstance(message, Failed):
            if message.code == DEVICE_ERROR:
                slot.kill(DEVICE_ERROR, entry)
            return JobFailed(message.code, message.message, is_retryable=message.code in RETRYABLE)
        if self._times is not None and entry.started_s is not None:
            # The time that two jobs had in common counts once.
            self._times.add(entry.job.params, time.monotonic() - max(entry.started_s, slot.last_done_s))
        return JobDone(message.timings_ms, message.warnings, message.peak_memory_mb)

    def _refuse(self, failure: JobFailed) -> None:
        """End what has no place, and whatever comes from now on."""
        self._refusal = failure
        self._fail_pending(failure)

    def _fail_pending(self, failure: JobFailed) -> None:
        while self._pending:
            self._pending.popleft().settle(failure)

    # Supervision: one task per slot, and one that watches all of them.

    def _add_slot(self, device: str) -> None:
        settings = {name: getattr(self.config, name) for name in ENGINE_SETTINGS} | {"device": device}
        if self.facts is not None:
            settings |= {"dtype": self.facts.dtype, "vae_dtype": self.facts.vae_dtype}
        if self.config.num_workers and not settings["threads"]:
            settings["threads"] = max(1, usable_cpus() // self.config.num_workers)
        slot = WorkerSlot(len(self._slots), settings)
        self._slots.append(slot)
        self._tasks.append(asyncio.create_task(self._keep_slot(slot)))

    def _add_other_slots(self, facts: ModelFacts) -> None:
        """One worker per GPU; on a CPU as many as were asked for."""
        asked = self.config.num_workers
        if facts.device == "cpu":
            devices = [self.config.device] * (asked or 1)
        elif self.config.device in ("auto", "cuda"):
            if asked is not None and asked > facts.num_devices:
                logger.warning("workers=%d devices=%d one worker per device", asked, facts.num_devices)
            devices = [f"cuda:{index}" for index in range(min(asked or facts.num_devices, facts.num_devices))]
        else:
            devices = [self.config.device]
        for device in devices[1:]:
            self._add_slot(device)

    async def _keep_slot(self, slot: WorkerSlot) -> None:
        """Keep a worker process in a slot for as long as the task runs."""
        num_load_failures = 0
        while True:
            slot.end_reason, slot.suspect = "", None
            try:
                slot.process = await self._take_process()
                self._on_loaded(await slot.load(self.config.bundle))
                num_load_failures = 0
                self._place_jobs()
                while (message := await slot.process.receive()) is not None:
                    if isinstance(message, JobMessage):
                        self._on_message(slot, message)
                    elif isinstance(message, Ready):  # a fallback in the middle of its life
                        self.facts = message.facts
                reason = slot.end_reason or "died"
            except (CodmdError, OSError) as error:
                reason = "load"
                num_load_failures += 1
                if not self._goes_on_after(error, num_load_failures):
                    return
            finally:
                slot.is_ready = False
                if slot.process is not None:
                    await slot.process.end()
            slot.settle_lost_jobs(reason)
            self._place_jobs()
            self.restarts[reason] += 1
            exit_code = slot.process.exit_code if slot.process is not None else None
            logger.warning(
                "worker=%d exit_code=%s reason=%s restarts=%d", slot.index, exit_code, reason, self.restarts.total()
            )
            await asyncio.sleep(min(MAX_BACKOFF_S, 2.0 ** max(0, num_load_failures) - 1.0))

    def _goes_on_after(self, error: Exception, num_load_failures: int) -> bool:
        """Whether a worker that could not load is tried again; ends the jobs that wait where that will be long."""
        if self.facts is None:
            self._refuse(JobFailed("worker_fatal", str(error), counts_attempt=False))
            if self._on_fatal is not None:
                self._on_fatal(str(error))
            return False
        logger.error("worker cannot load: %s", error)
        # One that was killed while it loaded may do better the next time; what waits can wait for that.
        is_killed = isinstance(error, GenerationError) and error.code == "worker_died"
        if (not is_killed or num_load_failures > self.config.max_attempts) and not self.num_workers:
            self.load_error = f"the worker cannot be restarted: {error}"
            self._fail_pending(JobFailed("worker_died", self.load_error, is_retryable=True, counts_attempt=False))
        return True

    async def _take_process(self) -> WorkerProcess:
        """The spare, whose imports are done, or a new process."""
        spare, self._spare = self._spare, None
        if spare is not None:
            if spare.exit_code is None:
                return spare
            await spare.end()
        return await WorkerProcess.start(self._command)

    def _on_loaded(self, ready: Ready) -> None:
        self.load_error = ""
        for slot in self._slots:
            # Measured once: another worker, or this one after a restart, might measure otherwise and make other bytes.
            slot.settings |= {"dtype": ready.facts.dtype, "vae_dtype": ready.facts.vae_dtype}
        if self.facts is None:
            self.facts, self._times = ready.facts, ServiceTimes(ready.facts)
            self._add_other_slots(ready.facts)
            if self._on_ready is not None:
                self._on_ready(ready.facts)

    async def _watch(self) -> None:
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            now_s = time.monotonic()
            lag_s, last_s = now_s - last_s - WATCH_EVERY_S, now_s
            if lag_s > WATCH_EVERY_S:
                # This process stood still, not the workers: what they said meanwhile is still to be read.
                for slot in self._slots:
                    slot.forgive(lag_s)
                continue
            for slot in self._slots:
                slot.kill_if_hung(self._limits, self._times)
            try:
                await self._keep_spare(now_s)
            except OSError as error:
                logger.error("no spare worker: %s", error)

    async def _keep_spare(self, now_s: float) -> None:
        """Start the spare when every worker is warm and idle, or after a while."""
        if not self.config.spare_worker or not all(slot.is_ready for slot in self._slots):
            return
        if self._spare is not None and self._spare.exit_code is None:
            return
        is_idle = not any(slot.in_flight for slot in self._slots)
        ready_s = max(slot.ready_s for slot in self._slots)
        if now_s - ready_s > (SPARE_DELAY_S if is_idle else MAX_SPARE_DELAY_S):
            dead, self._spare = self._spare, None
            if dead is not None:
                await dead.end()
            self._spare = await WorkerProcess.start(self._command)
