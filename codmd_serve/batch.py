"""Makes many videos with one engine, in a process of its own: `python -m codmd_serve.batch < jobs.json`.

codmd-distill starts it for a study, because it imports no engine. Files that exist are kept, so a killed batch goes on
where it was. Standard input is one JSON object:

    {"bundle": FOLDER, "device": "auto", "dtype": "auto", "crf": 10, "jobs": [{"prompt": ..., "seed": 7, "path": ...}]}

One line on standard output for every video that is there: its path.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from codmd_serve.api.schemas import GenerateBody, to_params
from codmd_serve.commands import run_command
from codmd_serve.cpu import prepare_threads
from codmd_serve.errors import CodmdError, InvalidRequestError

PROGRAM = "codmd_serve.batch"


def main() -> int:
    """Make the videos that standard input asks for; return the exit code, see `codmd_serve.commands`."""
    prepare_threads(os.environ)  # before torch is imported
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    order = json.load(sys.stdin)
    return run_command(PROGRAM, lambda: make_videos(order, os.getppid()))


def make_videos(order: dict[str, Any], parent: int) -> int:
    """Make the videos of an order, and stop when the process that asked for them is gone.

    Args:
        order: see the head of this file.
        parent: process id of who asked.

    Raises:
        CodmdError: the bundle cannot be loaded, or a video cannot be made; those made before stay.
    """
    missing = []
    for job in order["jobs"]:
        if Path(job["path"]).is_file():
            print(job["path"], flush=True)
        else:
            missing.append(job)
    if not missing:
        return 0
    from codmd_serve.loading import load_engine
    from codmd_serve.wan.checkpoint import silence_libraries

    silence_libraries()
    engine = load_engine(Path(order["bundle"]), order["device"], order["dtype"])
    for job in missing:
        if os.getppid() != parent:
            raise CodmdError("whoever asked for the videos is gone")
        try:
            body = GenerateBody.model_validate({"prompt": job["prompt"], "seed": job["seed"], "crf": order["crf"]})
        except ValueError as error:
            raise InvalidRequestError(f"the prompt of {Path(job['path']).name} cannot be drawn: {error}") from error
        engine.generate(to_params(body, engine.facts, max_pixels=sys.maxsize), Path(job["path"]))
        print(job["path"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
