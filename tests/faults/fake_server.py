"""`codmd-serve` whose workers have the fake engine of tests/codmd_serve/fake_worker.py, and hang for less long.

Everything else is the real thing: command line, server, dispatcher, pool, store.
"""

import functools
import sys
from pathlib import Path

from codmd_serve import cli, pool, serving, worker_process, worker_slot

FAKE_WORKER = Path(__file__).parent.parent / "codmd_serve" / "fake_worker.py"


def main() -> int:
    command = (sys.executable, str(FAKE_WORKER))
    worker_process.WORKER_COMMAND = command
    serving.make_backend = functools.partial(serving.make_backend, command=command)
    serving.run_worker = functools.partial(serving.run_worker, command=command)  # type: ignore[assignment]
    # Silence of a worker; a machine that is busy with other tests must not be taken for one.
    worker_slot.SUSPECT_SILENCE_S, worker_slot.MAX_SILENCE_S = 4.0, 8.0
    pool.MAX_BACKOFF_S = 0.05
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
