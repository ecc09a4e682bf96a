"""One worker process as its owner sees it: start, send, receive, kill. Knows no job and no policy."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator, Sequence
from pathlib import Path

from codmd_serve.messages import MAX_MESSAGE_BYTES, FromWorker, ToWorker, decode, encode

WORKER_COMMAND = (sys.executable, "-P", "-m", "codmd_serve.worker")
MAX_DYING_S = 10.0

logger = logging.getLogger(__name__)


class WorkerProcess:
    """A running worker and the channel to it.

    Attributes:
        heard_s: time.monotonic of its last message, or of its start.
    """

    def __init__(self, process: Process) -> None:
        self.heard_s = time.monotonic()
        self._process = process
        self._is_collected = False

    @classmethod
    async def start(cls, command: Sequence[str]) -> "WorkerProcess":
        """Start `command` in a session of its own, so that Ctrl-C reaches the owner only.

        Raises:
            OSError: there is no such program.
        """
        return cls(
            await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, limit=MAX_MESSAGE_BYTES, start_new_session=True
            )
        )

    @property
    def pid(self) -> int:
        """Process id; also of the session that its encoder is in."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.returncode

    def send(self, message: ToWorker) -> None:
        """Queue a message. To a dead process it goes nowhere: `receive` tells the end."""
        assert self._process.stdin is not None
        self._process.stdin.write(encode(message))

    async def receive(self) -> FromWorker | None:
        """The next message; None when the process is gone, also in the middle of a line, or sends no message."""
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
            if not line.endswith(b"\n"):
                return None
            message = decode(line)
            if isinstance(message, ToWorker):
                raise ValueError(f"a worker does not send {type(message).__name__}")
        except ValueError as error:
            logger.error("worker pid=%d %s", self.pid, error)
            return None
        self.heard_s = time.monotonic()
        return message

    def kill(self) -> None:
        """Kill it, stopped or not, and what it started. It keeps nothing that a gentler end would save."""
        if self.exit_code is None:
            # Not Process.kill(): it polls first, and may so take the exit code of a dead process from asyncio, which
            # then reports 255. The id may be free until the loop hears of the end, but is not given out that soon.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        for pid in _session(self.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    async def end(self) -> None:
        """Kill and collect it, unless a driver keeps it from dying."""
        if self._is_collected:
            return
        self.kill()
        try:
            # Not wait(): that leaves the pipes to the garbage collector.
            await asyncio.wait_for(self._process.communicate(b""), MAX_DYING_S)
        except TimeoutError:
            logger.error("worker pid=%d does not die", self.pid)
            return
        self._is_collected = True


@contextlib.contextmanager
def worker_ahead(runner: asyncio.Runner) -> Iterator[WorkerProcess | None]:
    """Start a worker, so that it imports while this process imports the server; end it with the block.

    Args:
        runner: of the event loop that the pool will live on.

    Yields:
        A spare for the pool; None where it could not be started, which the pool will report.
    """
    try:
        process = runner.run(WorkerProcess.start(WORKER_COMMAND))
    except OSError:
        yield None
        return
    try:
        yield process
    finally:
        runner.run(process.end())


def _session(leader: int) -> Iterator[int]:
    """Ids of the processes in a session besides its leader. Empty where there is no /proc."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # The name, in parentheses, may hold anything; behind it: state, parent, process group, session.
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == leader and int(entry.name) != leader:
                yield int(entry.name)
