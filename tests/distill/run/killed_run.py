"""A training run that kills itself with SIGKILL at one moment: python killed_run.py CONFIG OUT CACHE MOMENT.

Moments of the save of iteration 4, and one outside of it:
writing   half of the shard is on disk
written   all of it is, the index is not
indexed   the index is too, the checkpoint is not yet under its name
named     it is, older ones are not yet deleted
deleting  older ones are half deleted
training  between two saves, in the critic's turn of iteration 4
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.methods.matching import MatchingMethod
from distill.methods.registry import config_from_dict
from distill.parallel import shard_files
from distill.run.trainer import RunOptions, run_training

EARLIER, FATAL = "step-00000002", "step-00000004"
DEADLINE_S = 120.0


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, out: Path) -> None:
    """Put the kill in the place of the call that stands at that moment."""
    checkpoints = out / "checkpoints"
    if moment == "training":
        MatchingMethod.losses = dying(MatchingMethod.losses, checkpoints)  # type: ignore[method-assign]
    elif moment in ("writing", "written"):
        arm_write(moment, checkpoints)
    elif moment in ("indexed", "named", "deleting"):
        arm_names(moment)
    else:
        raise ValueError(moment)


def arm_write(moment: str, checkpoints: Path) -> None:
    write_all, write_json = shard_files.write_all, shard_files.write_json

    def half_write(file: Any, view: memoryview) -> None:
        if (checkpoints / EARLIER).is_dir() and file.tell() > 10_000:
            write_all(file, view[: len(view) // 2])
            die()
        write_all(file, view)

    def no_index(*args: Any, **options: Any) -> None:
        if (checkpoints / EARLIER).is_dir():
            die()
        write_json(*args, **options)

    if moment == "writing":
        shard_files.write_all = half_write
    else:
        shard_files.write_json = no_index


def arm_names(moment: str) -> None:
    rename, rmtree = Path.rename, shutil.rmtree

    def checked_rename(self: Path, target: Path) -> Path:
        if (moment == "indexed" and target.name == FATAL) or (moment == "named" and self.name == EARLIER):
            die()
        return rename(self, target)

    def half_rmtree(path: Path, **options: Any) -> None:
        if EARLIER in path.name:
            (path / shard_files.INDEX_FILE).unlink()
            die()
        rmtree(path, **options)

    if moment == "deleting":
        shutil.rmtree = half_rmtree  # type: ignore[assignment]
    else:
        Path.rename = checked_rename  # type: ignore[method-assign]


def dying(losses: Callable[..., Any], checkpoints: Path) -> Callable[..., Any]:
    calls: list[int] = []

    def counted(method: MatchingMethod, turn: Any) -> Any:
        if turn.role == "critic":
            calls.append(1)
        if len(calls) == 4:
            # The save of iteration 2 goes on in the background.
            deadline = time.monotonic() + DEADLINE_S
            while not (checkpoints / EARLIER).is_dir() and time.monotonic() < deadline:
                time.sleep(0.01)
            die()
        return losses(method, turn)

    return counted


if __name__ == "__main__":
    config_path, out, cache, chosen = sys.argv[1:]
    torch.set_num_threads(1)
    arm(chosen, Path(out))
    run_training(
        config_from_dict(json.loads(Path(config_path).read_text(encoding="utf-8"))),
        RunOptions(out=Path(out), device=torch.device("cpu"), cache_dir=Path(cache), preview_every_iterations=0),
        resume=False,
    )
