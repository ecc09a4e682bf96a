"""A dispatcher in a test: its settings, what it reported, and waiting with a deadline."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from codmd_serve.config import GenerateParams, ModelFacts, ServeConfig
from codmd_serve.dispatcher import Dispatcher, Job

PARAMS = GenerateParams(prompt="", seed=1, height=64, width=64, num_frames=17, fps=16, crf=18)
DEADLINE_S = 120.0


class Harness:
    """A dispatcher whose workers are fake, and what it reported."""

    def __init__(self, folder: Path, command: tuple[str, ...], **settings: Any) -> None:
        self.folder = folder
        self.ready: list[ModelFacts] = []
        self.fatal: list[str] = []
        config = replace(ServeConfig(bundle=str(folder)), **settings)
        self.dispatcher = Dispatcher(config, command, self.ready.append, self.fatal.append)

    def submit(self, prompt: str) -> Job:
        return self.dispatcher.submit(replace(PARAMS, prompt=prompt))

    async def result(self, job: Job) -> str:
        await asyncio.wait_for(job.finished.wait(), DEADLINE_S)
        return job.status

    async def until(self, is_true: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_true():
                await asyncio.sleep(0.002)

    @property
    def starts(self) -> list[int]:
        path = self.folder / "starts"
        return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []

    def gate(self, name: str = "gate") -> Path:
        return self.folder / name


Play = Callable[..., None]
