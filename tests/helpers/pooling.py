"""A worker pool in a test, with fake workers: running jobs, what they reported, and waiting with a deadline."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from codmd_serve.config import GenerateParams, ServeConfig
from codmd_serve.messages import Progress, Started
from codmd_serve.pool import Event, JobRequest, Outcome, WorkerPool
from codmd_serve.worker_process import WorkerProcess

PARAMS = GenerateParams(prompt="", seed=1, height=64, width=64, num_frames=17, fps=16, crf=18)
DEADLINE_S = 120.0


class Ran:
    """A job that was submitted: its events so far, and its outcome."""

    def __init__(self, pool: WorkerPool, job: JobRequest) -> None:
        self.job = job
        self.events: list[Event] = []
        self.future = pool.submit(job, self.events.append)

    @property
    def is_started(self) -> bool:
        return any(isinstance(event, Started) for event in self.events)

    @property
    def stage(self) -> str:
        return next((event.stage for event in reversed(self.events) if isinstance(event, Progress)), "")

    async def outcome(self) -> Outcome:
        return await asyncio.wait_for(asyncio.shield(self.future), DEADLINE_S)


class PoolHarness:
    """A pool whose workers are fake, and a folder that is their memory."""

    def __init__(
        self, folder: Path, command: tuple[str, ...], spare: WorkerProcess | None = None, **settings: Any
    ) -> None:
        self.folder = folder
        self.fatal: list[str] = []
        config = replace(ServeConfig(bundle=str(folder), spare_worker=False), **settings)
        self.pool = WorkerPool(config, command, on_fatal=self.fatal.append, spare=spare)
        self._num_jobs = 0

    def submit(self, prompt: str, **changes: Any) -> Ran:
        self._num_jobs += 1
        name = f"j{self._num_jobs}"
        params = replace(PARAMS, prompt=prompt)
        return Ran(self.pool, JobRequest(id=name, params=params, path=self.folder / "spool" / f"{name}.mp4", **changes))

    async def until(self, is_true: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_true():
                await asyncio.sleep(0.002)

    @property
    def starts(self) -> list[int]:
        """Process ids of the workers that were told to load, in order."""
        path = self.folder / "starts"
        return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def devices(self) -> list[str]:
        path = self.folder / "starts"
        return [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []

    def gate(self, name: str = "gate") -> Path:
        return self.folder / name


def run_pool(
    story: Callable[[PoolHarness], Awaitable[None]], folder: Path, command: tuple[str, ...], **settings: Any
) -> None:
    """Run a coroutine function with a started pool; `settings` are those of ServeConfig."""

    async def main() -> None:
        harness = PoolHarness(folder, command, **settings)
        await harness.pool.start()
        try:
            await story(harness)
        finally:
            await harness.pool.stop()

    asyncio.run(main())
