"""A training run that kills itself with SIGKILL at one moment: python killed_run.py CONFIG OUT CACHE MOMENT.

Moments of the save of step 4, and one outside of it:
writing   half of state.pt is on disk
written   all of it is, the checkpoint is not yet under its name
named     it is, older ones are not yet deleted
deleting  older ones are half deleted
training  between two saves, in the critic's step of iteration 4
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.methods.matching import MatchingMethod
from distill.methods.registry import config_from_dict
from distill.run import checkpoint
from distill.run.trainer import RunOptions, run_training

FATAL = "step-00000004"


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Put the kill in the place of the call that stands at that moment."""
    save, rename, rmtree = torch.save, Path.rename, shutil.rmtree

    saves: list[int] = []

    def half_save(state: Any, file: Any) -> None:
        save(state, file)
        saves.append(1)
        if len(saves) == 2:  # of step 4
            file.flush()
            file.truncate(file.tell() // 2)
            die()

    def checked_rename(self: Path, target: Path) -> Path:
        if target.name == FATAL and moment == "written":
            die()
        return rename(self, target)

    def checked_rmtree(path: Path, **options: Any) -> None:
        if path.name.startswith(checkpoint.STEP_PREFIX) and (path.parent / FATAL).is_dir():
            if moment == "deleting":
                (path / checkpoint.STATE_FILE).unlink()
            die()
        rmtree(path, **options)

    if moment == "writing":
        torch.save = half_save
    elif moment == "written":
        Path.rename = checked_rename  # type: ignore[method-assign]
    elif moment in ("named", "deleting"):
        shutil.rmtree = checked_rmtree  # type: ignore[assignment]
    elif moment == "training":
        MatchingMethod.losses = dying(MatchingMethod.losses)  # type: ignore[method-assign]
    else:
        raise ValueError(moment)


def dying(losses: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[int] = []

    def counted(method: MatchingMethod, turn: Any) -> Any:
        if turn.role == "critic":
            calls.append(1)
        return die() if len(calls) == 4 else losses(method, turn)

    return counted


if __name__ == "__main__":
    config_path, out, cache, chosen = sys.argv[1:]
    torch.set_num_threads(1)
    arm(chosen)
    run_training(
        config_from_dict(json.loads(Path(config_path).read_text(encoding="utf-8"))),
        RunOptions(out=Path(out), device=torch.device("cpu"), cache_dir=Path(cache), preview_every_iterations=0),
        resume=False,
    )
