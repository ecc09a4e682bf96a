"""Runs `codmd-distill train` in several gloo processes, run after run; started by test_restarts.py.

A program of its own, which forks after importing once: a fork of pytest would inherit its threads.

    python run_restarts.py RUNS.json OUT

RUNS.json holds a list of {"name", "world_size", "arguments", "accident", "copy_of"}. Each process is told what torchrun
would tell it, and writes OUT/NAME-RANK.json: its exit code, and what it printed as error. Accidents:

sigterm    the last process sends itself SIGTERM in its third iteration; the others get no signal
full disk  the first process saves step 4 to a device that is always full
bug        the first process's save of step 4 fails with an error that nobody thought of
"""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from distill.cli import main as run_command
from distill.run import checkpoint, trainer


def arm(accident: str, rank: int, world_size: int) -> None:
    """Put the accident in the place of the call that stands at its moment."""
    iterate, save = trainer.Trainer.iterate, trainer.save_checkpoint

    def signalled(self: trainer.Trainer) -> Any:
        if self.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(self)

    def failing_save(run_dir: Path, step: int, *rest: Any) -> Path:
        if step == 4 and accident == "bug":
            raise ZeroDivisionError("nobody thought of this")
        if step == 4:
            checkpoint.STATE_FILE = "/dev/full"
        return save(run_dir, step, *rest)

    if accident == "sigterm" and rank == world_size - 1:
        trainer.Trainer.iterate = signalled  # type: ignore[method-assign]
    if accident in ("full disk", "bug"):
        trainer.save_checkpoint = failing_save


def run(rank: int, wanted: dict[str, Any], port: int, out: Path) -> None:
    torch.set_num_threads(1)
    world_size, printed = wanted["world_size"], io.StringIO()
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    arm(wanted["accident"], rank, world_size)
    with contextlib.redirect_stderr(printed):
        try:
            code = run_command(["train", *wanted["arguments"]])
        except ZeroDivisionError as error:
            code = repr(error)
    told = {"code": code, "error": printed.getvalue()}
    (out / f"{wanted['name']}-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    runs, out = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    context = torch.multiprocessing.get_context("fork")
    for wanted in runs:
        if wanted["copy_of"]:
            shutil.copytree(out / wanted["copy_of"], out / wanted["name"])
        port = free_port()
        processes = [
            context.Process(target=run, args=(rank, wanted, port, out), daemon=True)
            for rank in range(wanted["world_size"])
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
