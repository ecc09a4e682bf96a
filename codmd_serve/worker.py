"""The process around one engine: jobs in on stdin, what becomes of them out on stdout, one JSON object per line.

In:   {"type": "load", "bundle", and the ENGINE_SETTINGS} once, then {"type": "generate", "id", "path", "params"} and
      {"type": "cancel", "id"}. The end of the input ends the process, so a worker never outlives its server.
Out:  {"type": "ready", "facts"} or {"type": "fatal", "message"}; then per job {"type": "progress", "id", "stage",
      "done", "total"} and one of "done" (timings_ms, warnings), "failed" (code, message), "cancelled".

Knows nothing of HTTP or of the queue. Nothing heavy is imported before the process runs as a worker.
"""

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from codmd_serve.config import ENGINE_SETTINGS, GenerateParams
from codmd_serve.errors import CancelledError, CodmdError, GenerationError

if TYPE_CHECKING:
    from codmd_serve.engine import Engine

Message = dict[str, Any]
Send = Callable[[Message], None]

log = logging.getLogger(__name__)


def main() -> None:
    """Run as a worker until the input ends."""
    # Libraries print; the channel is moved away from them, and what they print goes to the server's log.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")

    def send(message: Message) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    first = sys.stdin.readline()
    if first:
        serve(json.loads(first), sys.stdin, send)


def serve(load: Message, lines: IO[str], send: Send) -> None:
    """Load the engine that `load` asks for, then do the jobs that arrive, one at a time."""
    from codmd_serve.engine import load_engine
    from codmd_serve.wan.checkpoint import silence_libraries

    silence_libraries()
    try:
        engine = load_engine(Path(load["bundle"]), **{name: load[name] for name in ENGINE_SETTINGS})
    except CodmdError as error:
        send({"type": "fatal", "message": str(error)})
        return
    send({"type": "ready", "facts": asdict(engine.facts)})
    jobs: queue.Queue[Message] = queue.Queue()
    cancelled: set[str] = set()
    threading.Thread(target=_read, args=(lines, jobs, cancelled), daemon=True).start()
    while True:
        run_job(engine, jobs.get(), cancelled, send)


def _read(lines: IO[str], jobs: "queue.Queue[Message]", cancelled: set[str]) -> None:
    for line in lines:
        message = json.loads(line)
        if message["type"] == "cancel":
            cancelled.add(message["id"])
        else:
            jobs.put(message)
    # Nobody is left to make a video for, whatever step it is at.
    os._exit(0)


def run_job(engine: "Engine", job: Message, cancelled: set[str], send: Send) -> None:
    """Do one job and say what became of it; no failure of a job leaves this function.

    Args:
        engine: a loaded engine.
        job: a generate message.
        cancelled: ids of jobs to give up, filled by another thread.
        send: takes the messages out.
    """
    job_id = job["id"]

    def on_progress(stage: str, done: int, total: int) -> None:
        if job_id in cancelled:
            raise CancelledError(f"job {job_id} was cancelled")
        send({"type": "progress", "id": job_id, "stage": stage, "done": done, "total": total})

    try:
        result = engine.generate(GenerateParams(**job["params"]), Path(job["path"]), on_progress)
        send({"type": "done", "id": job_id, "timings_ms": result.timings_ms, "warnings": result.warnings})
    except CancelledError:
        send({"type": "cancelled", "id": job_id})
    except GenerationError as error:
        log.error("job=%s code=%s message=%r", job_id, error.code, str(error))
        send({"type": "failed", "id": job_id, "code": error.code, "message": str(error)})
    except Exception:  # the worker boundary: this job fails, the next one runs
        log.exception("job=%s code=internal_error", job_id)
        message = f"internal error; the server's log has the details under job {job_id}"
        send({"type": "failed", "id": job_id, "code": "internal_error", "message": message})
    finally:
        cancelled.discard(job_id)


if __name__ == "__main__":
    main()
