"""The regressed start of a cell, made once for all arms whose start is the same run.

CACHE/starts/KEY/      the run folder of one start; RUN/start of each run that begins from it is a link to it
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from dataclasses import replace
from pathlib import Path

from distill.config import DistillConfig
from distill.data.teacher_latents import latents_key
from distill.methods.registry import METHODS
from distill.networks.base import open_base
from distill.run.start import START_FOLDER
from distill.run.trainer import RunOptions, run_training


def shared_start(start: DistillConfig, options: RunOptions) -> Path | None:
    """Return the folder of a start's run, with its bundle, training it or going on with it where it is not there.

    Args:
        start: of `regression.start_of`.
        options: of the run that begins from it; its cache_dir has the folder.

    Returns:
        None when a signal interrupted the training.

    Raises:
        ConfigError, CheckpointError, CodmdError: as `run_training`.
    """
    assert options.cache_dir is not None
    out = options.cache_dir / "starts" / _key(start, options.cache_dir)[:16]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as file:
        # Another worker that needs it waits.
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (out / "bundle" / "student.json").is_file():
            own = replace(options, out=out)
            if run_training(start, own, resume=(out / "config.json").is_file()).bundle is None:
                return None
    return out


def link_start(start: DistillConfig, options: RunOptions) -> bool:
    """Give the run of `options` its start, unless it has one of its own already; return False on a signal."""
    link = options.out / START_FOLDER
    if link.exists():
        return True
    folder = shared_start(start, options)
    if folder is None:
        return False
    options.out.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(folder.resolve(), options.out.resolve()))
    return True


def _key(start: DistillConfig, cache_dir: Path) -> str:
    base = open_base(start.base).prepared(cache_dir)
    sampling = METHODS[start.method].teacher_sampling(start)
    assert sampling is not None
    return hashlib.sha256(f"{start.sha256()} {latents_key(start, sampling, base)}".encode()).hexdigest()
