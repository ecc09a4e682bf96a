"""A runner in the test's own process, whose prompts are orders: for tests of dispatcher and API without any worker.

wait FILE       goes on reporting step 1 until FILE exists
deaf FILE       the same, and does not obey a cancellation
oom, full, unwritable, bug
                fails, with the code of that
die             its worker dies, every time;  die-once FILE: unless FILE exists; leaves it
anything else   is made at once; the words in capitals become warnings
"""

import asyncio
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from codmd_serve.config import GenerateParams, ModelFacts
from codmd_serve.files import TEMPORARY_PREFIX
from codmd_serve.messages import Progress, Started
from codmd_serve.worker_slot import JobCancelled, JobDone, JobFailed, JobRequest, OnEvent, Outcome

FACTS = ModelFacts(
    name="fake",
    device="cpu",
    dtype="float32",
    attention="none",
    execution="eager",
    num_steps=4,
    height=64,
    width=64,
    num_frames=17,
    fps=16,
    size_multiple=16,
    max_side_px=1024,
    frame_multiple=4,
    max_num_frames=101,
    service_s=2.5,
    load_s=0.1,
)
FAILURES = {
    "oom": ("out_of_memory", "out of memory at this shape"),
    "full": ("storage_full", "the server's disk is full"),
    "unwritable": ("storage_unwritable", "the server cannot write videos"),
    "bug": ("internal_error", "internal error; the server's log has the details"),
}
PREVIEW = "data:image/webp;base64,UklGRg=="


def video_of(params: GenerateParams) -> bytes:
    return b"mp4 " + json.dumps(asdict(params)).encode()


class FakeRunner:
    """One worker that never leaves the process."""

    def __init__(self) -> None:
        self.facts: ModelFacts | None = FACTS
        self.load_error = ""
        self.is_ready = True
        self.num_hanging = 0
        self.restarts: Counter[str] = Counter()
        self.ran: list[str] = []
        self.capacity = 1
        self._free = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._is_stopped = False

    @property
    def num_workers(self) -> int:
        return int(self.is_ready)

    async def start(self) -> None:
        self._free.set()

    async def stop(self, drain_s: float = 0.0) -> None:
        self._is_stopped = True
        if self._tasks and drain_s:
            await asyncio.wait(list(self._tasks.values()), timeout=drain_s)
        for task in list(self._tasks.values()):
            task.cancel("stopped")
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def wait_for_capacity(self) -> None:
        await self._free.wait()

    def submit(self, job: JobRequest, on_event: OnEvent) -> "asyncio.Future[Outcome]":
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._run(job, on_event, outcome))
        self._tasks[job.id] = task
        if len(self._tasks) >= self.capacity:
            self._free.clear()
        task.add_done_callback(lambda _: self._on_done(job.id))
        return outcome

    def _on_done(self, job_id: str) -> None:
        del self._tasks[job_id]
        self._free.set()

    def cancel(self, job_id: str) -> None:
        if job_id in self._tasks:
            # After its first turn: a task that never began would not say how it ended.
            asyncio.get_running_loop().call_soon(self._tasks[job_id].cancel, "cancelled")

    def service_s(self, params: GenerateParams) -> float:
        return 2.5

    def seconds_to_place(self) -> float:
        return 2.5 if self._tasks else 0.0

    async def _run(self, job: JobRequest, on_event: OnEvent, outcome: "asyncio.Future[Outcome]") -> None:
        try:
            outcome.set_result(await self._make(job, on_event))
        except asyncio.CancelledError as error:
            stopped = JobFailed("shutting_down", "the server is shutting down", True, counts_attempt=False)
            outcome.set_result(stopped if error.args == ("stopped",) else JobCancelled())

    async def _make(self, job: JobRequest, on_event: OnEvent) -> Outcome:
        order, _, rest = job.params.prompt.partition(" ")
        self.ran.append(job.params.prompt)
        on_event(Started(job.id))
        on_event(Progress(job.id, "text", 1, 1))
        while order in ("wait", "deaf") and not Path(rest).exists():
            on_event(Progress(job.id, "denoise", 1, 4))
            try:
                await asyncio.sleep(0.002)
            except asyncio.CancelledError as error:
                if order == "wait" or error.args == ("stopped",):
                    raise
        if order in FAILURES:
            return JobFailed(*FAILURES[order])
        if order == "die" or (order == "die-once" and not Path(rest).exists()):
            job.path.with_name(f"{TEMPORARY_PREFIX}1.partial").write_bytes(b"half")
            if rest:
                Path(rest).touch()
            return JobFailed("worker_died", "the worker died, perhaps for want of memory", is_retryable=True)
        for step in range(1, 5):
            on_event(Progress(job.id, "denoise", step, 4, PREVIEW if job.is_previewed else ""))
        on_event(Progress(job.id, "decode", 17, 17))
        job.path.write_bytes(video_of(job.params))
        timings_ms = {"text": 1.0, "denoise": 20.25, "decode": 3.0, "encode": 4.0}
        return JobDone(timings_ms, [word for word in job.params.prompt.split() if word.isupper()], 12.5)
