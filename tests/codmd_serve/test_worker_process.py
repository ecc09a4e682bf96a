"""A worker process as its owner sees it: how it ended is known, whoever was first to notice."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest
from polling import wait_until

from codmd_serve.worker_process import WorkerProcess


def is_dead(pid: int) -> bool:
    """Whether it has ended and nobody has waited for it."""
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_exit_code_of_a_process_that_dies_while_it_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio's watcher is held back until `kill` is over, so that the process is dead and not collected by then."""
    is_killed = threading.Event()
    waitpid = os.waitpid

    def late(pid: int, options: int) -> tuple[int, int]:
        if threading.current_thread() is not threading.main_thread():
            is_killed.wait()
        return waitpid(pid, options)

    async def main() -> int | None:
        process = await WorkerProcess.start(["sleep", "60"])
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: is_dead(process.pid), 30.0, "the process is dead")
        process.kill()
        is_killed.set()
        await process.end()
        return process.exit_code

    monkeypatch.setattr(os, "waitpid", late)
    assert asyncio.run(main()) == -signal.SIGTERM
