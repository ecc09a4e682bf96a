"""The process around one engine: messages in on stdin, messages out on stdout (messages.py has them all).

Jobs may be sent before the running one is done. They start in order of arrival, each as soon as the one before it is
denoised where the engine overlaps videos, else as soon as it is decoded; its encoder may still be at work. Whether
sending early pays is for the sender to decide. The end of the input ends the process, so a worker never outlives its
server.

A process that was given no engine to load yet is a spare: its imports are done, which takes longer than loading.

Threads: `main` runs the engine, which has its own to decode and to encode; one reads, so that a cancellation is seen at
once; one embeds the prompt of the job that waits; one sends heartbeats. Knows nothing of HTTP or of the queue. Nothing
heavy is imported before `main`.
"""

import base64
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING

from codmd_serve.caches import prepare_caches
from codmd_serve.cpu import prepare_threads
from codmd_serve.errors import CancelledError, CodmdError, GenerationError
from codmd_serve.lean_imports import import_lean
from codmd_serve.messages import (
    DEVICE_ERROR,
    HEARTBEAT_S,
    Alive,
    Cancel,
    Cancelled,
    Done,
    Failed,
    Fatal,
    FromWorker,
    Generate,
    Load,
    Progress,
    Ready,
    Started,
    decode,
    encode,
)

if TYPE_CHECKING:
    from codmd_serve.engine import Engine, GenerateResult

Send = Callable[[FromWorker], None]
EXIT_DEVICE_ERROR = 70
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

logger = logging.getLogger(__name__)


def main() -> None:
    """Run as a worker until the input ends."""
    _die_with_parent()
    prepare_threads(os.environ)  # before torch is imported
    # Libraries print; the channel is moved away from them, and what they print goes to the server's logger.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")

    writing = threading.Lock()

    def send(message: FromWorker) -> None:
        with writing:
            channel.write(encode(message))
            channel.flush()

    import_lean("codmd_serve.loading")  # takes seconds, which a spare has behind it when it is needed

    first = sys.stdin.readline()
    if first:
        load = decode(first)
        assert isinstance(load, Load), f"expected a load message first, got {load}"
        threading.Thread(target=_send_heartbeats, args=(send,), daemon=True).start()
        serve_jobs(load, sys.stdin, send)


def _die_with_parent() -> None:
    """Let the kernel kill this process with its parent: one that is stopped cannot read the end of its input."""
    if sys.platform == "linux":
        parent = os.getppid()
        with contextlib.suppress(OSError, AttributeError):  # a libc without it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def _send_heartbeats(send: Send) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
        while True:
            send(Alive())
            time.sleep(HEARTBEAT_S)


def serve_jobs(load: Load, lines: IO[str], send: Send) -> None:
    """Load the engine that `load` asks for, then do the jobs that arrive, in order."""
    # Both compilers look when they first compile: torch may have been imported, by a spare.
    prepare_caches(os.environ, str(load.settings.get("cache", "")))
    from codmd_serve.loading import load_engine
    from codmd_serve.wan.checkpoint import silence_libraries

    silence_libraries()
    _take_device(str(load.settings.get("device", "")))
    try:
        engine = load_engine(Path(load.bundle), **load.settings)
    except CodmdError as error:
        send(Fatal(str(error)))
        return
    send(Ready(engine.facts))
    inbox, cancelled = Inbox(), set[str]()
    threading.Thread(target=_read_messages, args=(engine, lines, inbox, cancelled, send), daemon=True).start()
    while True:
        run_job(engine, inbox.take(), cancelled, send)


def _take_device(name: str) -> None:
    """Make a GPU that is asked for by number the current one of this thread, which does all jobs.

    For kernels of other packages that go to the current device, SageAttention's among them. What is no device of this
    machine is left to the engine, which says so.
    """
    index = name.removeprefix("cuda:")
    if index != name and index.isdecimal():
        import torch

        if int(index) < torch.cuda.device_count():
            torch.cuda.set_device(int(index))


class Inbox:
    """Jobs that wait in this process; one thread puts them in and takes back what is cancelled, another does them."""

    def __init__(self) -> None:
        self._jobs: deque[Generate] = deque()
        self._changed = threading.Condition()
        self._is_awaited = False

    def put(self, job: Generate) -> bool:
        """Let a job wait; True when it has something to wait for."""
        with self._changed:
            has_to_wait = bool(self._jobs) or not self._is_awaited
            self._jobs.append(job)
            self._changed.notify()
            return has_to_wait

    def take(self) -> Generate:
        """The job that has waited longest, as soon as there is one."""
        with self._changed:
            self._is_awaited = True
            self._changed.wait_for(lambda: self._jobs)
            self._is_awaited = False
            return self._jobs.popleft()

    def take_back(self, job_id: str) -> bool:
        """Forget a job that still waits; False when it does not."""
        with self._changed:
            num_before = len(self._jobs)
            self._jobs = deque(job for job in self._jobs if job.id != job_id)
            return len(self._jobs) < num_before


def _read_messages(engine: "Engine", lines: IO[str], inbox: Inbox, cancelled: set[str], send: Send) -> None:
    with ThreadPoolExecutor(max_workers=1) as ahead:
        for line in lines:
            message = decode(line)
            if isinstance(message, Cancel):
                if inbox.take_back(message.id):
                    send(Cancelled(message.id))
                else:
                    cancelled.add(message.id)
            elif isinstance(message, Generate) and inbox.put(message) and not message.params.teacher:
                # What is wrong with a prompt shows again when its turn comes.
                ahead.submit(engine.prepare, message.params.prompt)
        # Nobody is left to make a video for, whatever step it is at.
        os._exit(0)


def run_job(engine: "Engine", job: Generate, cancelled: set[str], send: Send) -> None:
    """Run one job on the device; its outcome is sent once the mp4 is written. Never raises.

    Args:
        engine: a loaded engine.
        job: what to make.
        cancelled: ids of jobs to give up, filled by another thread.
        send: takes the messages out, from any thread.
    """

    told, preview = ("", 0), ""

    def on_preview(image: bytes) -> None:
        nonlocal preview
        preview = "data:image/webp;base64," + base64.b64encode(image).decode()

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal told, preview
        if job.id in cancelled:
            raise CancelledError(f"job {job.id} was cancelled")
        # While the encoder is waited for this is asked again and again: repeated, it would look like progress.
        if told != (stage, done):
            send(Progress(job.id, stage, done, total, preview))
        told, preview = (stage, done), ""

    facts = engine.facts

    def tell(video: "Future[GenerateResult]") -> None:
        cancelled.discard(job.id)
        if engine.facts is not facts:  # a fallback: before the outcome, whose content key it decides
            send(Ready(engine.facts))
        outcome = _outcome(job.id, video)
        send(outcome)
        if isinstance(outcome, Failed) and outcome.code == DEVICE_ERROR:
            os._exit(EXIT_DEVICE_ERROR)  # whatever this process asks of the device from now on fails

    send(Started(job.id))
    video: Future[GenerateResult] = Future()
    try:
        with contextlib.suppress(OSError):  # whoever writes there says what is wrong
            Path(job.path).parent.mkdir(parents=True, exist_ok=True)
        video = engine.begin(job.params, Path(job.path), on_progress, on_preview if job.is_previewed else None)
    except Exception as error:  # told like the failure of an encoder
        video.set_exception(error)
    video.add_done_callback(tell)


def _outcome(job_id: str, video: "Future[GenerateResult]") -> Done | Failed | Cancelled:
    try:
        result = video.result()
    except CancelledError:
        return Cancelled(job_id)
    except GenerationError as error:
        logger.error("job=%s code=%s message=%r", job_id, error.code, str(error))
        return Failed(job_id, error.code, str(error))
    except Exception:  # the worker boundary: this job fails, the next one runs
        logger.exception("job=%s code=internal_error", job_id)
        message = f"internal error; the server's log has the details under job {job_id}"
        return Failed(job_id, "internal_error", message)
    return Done(job_id, result.timings_ms, result.warnings, result.peak_memory_mb)


if __name__ == "__main__":
    main()
