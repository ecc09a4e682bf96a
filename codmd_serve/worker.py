"""The process around one engine: jobs in on stdin, what becomes of them out on stdout, one JSON object per line.

In:   {"type": "load", "bundle", and the ENGINE_SETTINGS} once, then {"type": "generate", "id", "path", "params"} and
      {"type": "cancel", "id"}. The end of the input ends the process, so a worker never outlives its server.
Out:  {"type": "ready", "facts"} or {"type": "fatal", "message"}; then per job {"type": "started", "id"}, {"type":
      "progress", "id", "stage", "done", "total"} and one of "done" (timings_ms, warnings), "failed" (code, message),
      "cancelled"; a job that was cancelled while it waited here was never started.

Jobs may be sent before the one that runs is done. They start in the order in which they came: each as soon as the
device has decoded the one before it, whose video may be encoded for a while yet. Whether that pays is for who sends.

Three threads: `main` has the engine; one reads, so that a cancellation is seen at once; one embeds the prompt of a job
that waits. Knows nothing of HTTP or of the queue. Nothing heavy is imported before the process runs as a worker.
"""

import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from codmd_serve.config import ENGINE_SETTINGS, GenerateParams
from codmd_serve.errors import CancelledError, CodmdError, GenerationError

if TYPE_CHECKING:
    from codmd_serve.engine import Engine, GenerateResult

Message = dict[str, Any]
Send = Callable[[Message], None]

log = logging.getLogger(__name__)


def main() -> None:
    """Run as a worker until the input ends."""
    # Libraries print; the channel is moved away from them, and what they print goes to the server's log.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")

    writing = threading.Lock()

    def send(message: Message) -> None:
        with writing:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

    first = sys.stdin.readline()
    if first:
        serve(json.loads(first), sys.stdin, send)


def serve(load: Message, lines: IO[str], send: Send) -> None:
    """Load the engine that `load` asks for, then do the jobs that arrive, in order."""
    from codmd_serve.engine import load_engine
    from codmd_serve.wan.checkpoint import silence_libraries

    silence_libraries()
    try:
        engine = load_engine(Path(load["bundle"]), **{name: load[name] for name in ENGINE_SETTINGS})
    except CodmdError as error:
        send({"type": "fatal", "message": str(error)})
        return
    send({"type": "ready", "facts": asdict(engine.facts)})
    inbox, cancelled = Inbox(), set[str]()
    threading.Thread(target=_read, args=(engine, lines, inbox, cancelled, send), daemon=True).start()
    while True:
        run_job(engine, inbox.take(), cancelled, send)


class Inbox:
    """Jobs that wait in this process; one thread puts them in and takes back what is cancelled, another does them."""

    def __init__(self) -> None:
        self._jobs: deque[Message] = deque()
        self._changed = threading.Condition()
        self._is_awaited = False

    def put(self, job: Message) -> bool:
        """Let a job wait; True when it has something to wait for."""
        with self._changed:
            has_to_wait = bool(self._jobs) or not self._is_awaited
            self._jobs.append(job)
            self._changed.notify()
            return has_to_wait

    def take(self) -> Message:
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
            self._jobs = deque(job for job in self._jobs if job["id"] != job_id)
            return len(self._jobs) < num_before


def _read(engine: "Engine", lines: IO[str], inbox: Inbox, cancelled: set[str], send: Send) -> None:
    with ThreadPoolExecutor(max_workers=1) as ahead:
        for line in lines:
            message = json.loads(line)
            if message["type"] == "cancel":
                if inbox.take_back(message["id"]):
                    send({"type": "cancelled", "id": message["id"]})
                else:
                    cancelled.add(message["id"])
            elif inbox.put(message):
                # What is wrong with a prompt shows again when its turn comes.
                ahead.submit(engine.prepare, message["params"]["prompt"])
        # Nobody is left to make a video for, whatever step it is at.
        os._exit(0)


def run_job(engine: "Engine", job: Message, cancelled: set[str], send: Send) -> None:
    """Do the device's part of one job, and have said what became of it when its video is finished.

    No failure of a job leaves this function.

    Args:
        engine: a loaded engine.
        job: a generate message.
        cancelled: ids of jobs to give up, filled by another thread.
        send: takes the messages out, from any thread.
    """
    job_id = job["id"]

    def on_progress(stage: str, done: int, total: int) -> None:
        if job_id in cancelled:
            raise CancelledError(f"job {job_id} was cancelled")
        send({"type": "progress", "id": job_id, "stage": stage, "done": done, "total": total})

    def tell(video: "Future[GenerateResult]") -> None:
        cancelled.discard(job_id)
        send({"id": job_id, **_outcome(job_id, video)})

    send({"type": "started", "id": job_id})
    video: Future[GenerateResult] = Future()
    try:
        video = engine.begin(GenerateParams(**job["params"]), Path(job["path"]), on_progress)
    except Exception as error:  # told like the failure of an encoder
        video.set_exception(error)
    video.add_done_callback(tell)


def _outcome(job_id: str, video: "Future[GenerateResult]") -> Message:
    try:
        result = video.result()
    except CancelledError:
        return {"type": "cancelled"}
    except GenerationError as error:
        log.error("job=%s code=%s message=%r", job_id, error.code, str(error))
        return {"type": "failed", "code": error.code, "message": str(error)}
    except Exception:  # the worker boundary: this job fails, the next one runs
        log.exception("job=%s code=internal_error", job_id)
        message = f"internal error; the server's log has the details under job {job_id}"
        return {"type": "failed", "code": "internal_error", "message": message}
    return {"type": "done", "timings_ms": result.timings_ms, "warnings": result.warnings}


if __name__ == "__main__":
    main()
