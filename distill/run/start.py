"""A run with its regressed start: first regression on the teacher's paths in OUT/start, then the method from there.

Each of the two is a run of its own, with log, checkpoints and bundle, so both can be resumed at any moment.

RUN/start/       the regressed start, a run folder of its own; only where start.updates is above 0
"""

import json
from dataclasses import replace
from pathlib import Path

from distill.config import DistillConfig
from distill.methods.regression import start_of
from distill.run.checks import check_out, start_folder
from distill.run.log import LOG_FILE
from distill.run.trainer import RunOptions, RunOutcome, run_training

START_FOLDER = "start"


def run_with_start(config: DistillConfig, options: RunOptions, *, resume: bool) -> RunOutcome:
    """Train as `run_training`, after the start that the config asks for.

    Args:
        config: its precision must be resolved; start.updates 0 leaves the start out.
        options: minutes are those of both together.
        resume: continue the run in `options.out`, at its start or after it.

    Returns:
        How the method's own run ended; or its start, when that was interrupted.

    Raises:
        ConfigError, CheckpointError, CodmdError: as `run_training`.
    """
    start = start_of(config)
    if start is None:
        return run_training(config, options, resume=resume)
    processes, out = options.processes, options.out
    processes.on_rank0(lambda: check_out(config, out, resume))
    processes.on_rank0(lambda: start_folder(out, config))
    own = replace(
        options,
        out=out / START_FOLDER,
        cache_dir=options.cache_dir or out / "cache",
        preview_every_iterations=0,
        has_pipeline=False,
    )
    bundle, holds_run, elapsed_s = processes.broadcast_from_rank0(lambda: _state(own.out))
    if bundle is None:
        outcome = run_training(start, own, resume=holds_run)
        if outcome.bundle is None:
            return outcome
        bundle, elapsed_s = outcome.bundle, outcome.elapsed_s
    return run_training(config, options, resume=True, started=bundle, elapsed_s=elapsed_s)


def _state(out: Path) -> tuple[Path | None, bool, float]:
    """Return the bundle that the start ended with, or None, whether it began, and the seconds it trained."""
    bundle, log = out / "bundle", out / LOG_FILE
    last = log.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")[2] if log.is_file() else ""
    elapsed_s = float(json.loads(last)["elapsed_s"]) if last else 0.0
    return (bundle if (bundle / "student.json").is_file() else None), (out / "config.json").is_file(), elapsed_s
