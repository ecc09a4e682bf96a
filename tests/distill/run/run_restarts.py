"""Runs `codmd-distill train` in several gloo processes, run after run; started by test_restarts.py.

A program of its own, which forks after importing once: a fork of pytest would inherit its threads.

    python run_restarts.py RUNS.json OUT

RUNS.json holds a list of {"name", "world_size", "arguments", "accident", "copy_of"}. Each process is told what torchrun
would tell it, and writes OUT/NAME-RANK.json: its exit code, and what it printed as error. Accidents:

sigterm    the last process sends itself SIGTERM in its third iteration; the others get no signal
full disk  the last process writes its shard of iteration 4 to a device that is always full
bug        the first process's save of iteration 4 fails with an error that nobody thought of
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
from distill.parallel import shard_files
from distill.run import saver, trainer


def arm(accident: str, rank: int, world_size: int) -> None:
    """Put the accident in the place of the call that stands at its moment."""
    iterate, write, saved = trainer.Trainer.iterate, shard_files.ShardWriter.write_data, saver.save_checkpoint

    def signalled(self: trainer.Trainer) -> Any:
        if self.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(self)

    def noted_save(run_dir: Path, iteration: int, *rest: Any) -> Path:
        saving.append(iteration)
        return saved(run_dir, iteration, *rest)

    def failing_write(self: shard_files.ShardWriter, *rest: Any) -> Any:
        if saving[-1] != 4:
            return write(self, *rest)
        if accident == "bug":
            raise ZeroDivisionError("nobody thought of this")
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"0")

    saving: list[int] = []
    if accident == "sigterm" and rank == world_size - 1:
        trainer.Trainer.iterate = signalled  # type: ignore[method-assign]
    if (accident == "full disk" and rank == world_size - 1) or (accident == "bug" and rank == 0):
        saver.save_checkpoint = noted_save
        shard_files.ShardWriter.write_data = failing_write  # type: ignore[method-assign]


def run(rank: int, wanted: dict[str, Any], port: int, out: Path) -> None:
    torch.set_num_threads(1)
    world_size, printed = wanted["world_size"], io.StringIO()
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    arm(wanted["accident"], rank, world_size)
    with contextlib.redirect_stderr(printed):
        code = run_command(["train", *wanted["arguments"]])
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
