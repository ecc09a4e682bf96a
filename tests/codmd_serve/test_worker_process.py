"""A worker process as its owner sees it: how it ended is known, whoever was first to notice."""

import asyncio
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from polling import wait_until
from pooling import PoolHarness

from codmd_serve import worker_process
from codmd_serve.errors import ConfigError
from codmd_serve.pool import JobDone
from codmd_serve.worker_process import WorkerProcess, worker_ahead

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


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


def test_a_worker_ahead_is_the_first_of_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (sys.executable, str(FAKE_WORKER))
    monkeypatch.setattr(worker_process, "WORKER_COMMAND", command)
    with asyncio.Runner() as runner, worker_ahead(runner) as spare:
        assert spare is not None and spare.exit_code is None
        harness = PoolHarness(tmp_path, command, spare=spare)

        async def story() -> None:
            await harness.pool.start()
            assert isinstance(await harness.submit("a").outcome(), JobDone)
            assert harness.starts == [spare.pid] and spare.exit_code is None
            await harness.pool.stop()

        runner.run(story())
    assert spare.exit_code == -signal.SIGKILL


def test_a_worker_ahead_ends_with_a_server_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "WORKER_COMMAND", ("sleep", "60"))
    with asyncio.Runner() as runner, pytest.raises(ConfigError), worker_ahead(runner) as spare:
        raise ConfigError("no such store")
    assert spare is not None and spare.exit_code == -signal.SIGKILL
    monkeypatch.setattr(worker_process, "WORKER_COMMAND", ("/no/such/program",))
    with asyncio.Runner() as runner, worker_ahead(runner) as spare:
        assert spare is None
