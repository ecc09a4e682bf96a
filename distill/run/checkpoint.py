"""Run folders on disk: the config, and checkpoints to resume from; knows no training loop.

RUN/config.json                    the resolved DistillConfig
RUN/log.jsonl                      means of all metrics (log.py)
RUN/curves.png, curves.csv         all of them and the scores of validation over the iteration (curves.py)
RUN/previews/                      pictures of the EMA student (previews.py)
RUN/start/                         the run of the regressed start, where `start.updates` asks for one
RUN/cache/                         packed prompts and samples, unless --cache says otherwise
RUN/checkpoints/step-00000200/     the state after 200 iterations, sharded (parallel/shard_files.py), complete or absent
RUN/best.json                      which checkpoint is kept as the best one, by which metric
RUN/bundle/                        the student, once the run has ended (bundle.py)
RUN/pipeline/                      the same as a complete diffusers folder, where the stock pipeline can sample it

Versions up to settings format 2 wrote a checkpoint as one file, state.pt; it is read here and nowhere else.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import TEMPORARY_PREFIX, first_line, leftovers, write_json
from codmd_serve.textfiles import read_json_object
from distill.config import RESUMABLE, DistillConfig, config_to_dict
from distill.methods.registry import config_from_dict
from distill.parallel.processes import SINGLE_PROCESS, Processes
from distill.parallel.shard_files import INDEX_FILE, ShardIndex, read_index
from distill.parallel.state import StagedShard, copy_whole, load_shards, save_shards
from distill.run.choice import is_better
from distill.settings import LOW

CONFIG_FILE = "config.json"
BEST_FILE = "best.json"
# Of older versions.
STATE_FILE = "state.pt"
STEP_PREFIX = "step-"


class Score(NamedTuple):
    """The value of a metric at a checkpoint, and whether `high` or `low` is better."""

    metric: str
    value: float
    better: str = LOW


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose index has been read; its tensors are on disk.

    Attributes:
        values: everything that is no tensor.
        index: of a sharded checkpoint; None for the single file of older versions.
        mapped: the memory-mapped tensors of such a file.
    """

    folder: Path
    values: dict[str, Any]
    index: ShardIndex | None
    mapped: dict[str, Tensor]

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self.mapped if self.index is None else self.index.tensors)

    def read(self, name: str) -> Tensor:
        """Return one whole tensor on the CPU.

        Raises:
            CheckpointError: it is not there, or its shards cannot be read.
        """
        if self.index is not None:
            return self.index.read(name)
        if name not in self.mapped:
            raise CheckpointError(f"checkpoint {self.folder} has no tensor {name}")
        return self.mapped[name]

    def load_into(self, targets: Mapping[str, Tensor], processes: Processes) -> None:
        """Copy the checkpoint into tensors, in place; each rank reads what its own shards need.

        Raises:
            CheckpointError: a name or size differs, or a shard cannot be read.
        """
        unmatched = sorted(self.names() ^ targets.keys())
        if unmatched:
            raise CheckpointError(f"it belongs to another network: {len(unmatched)} names differ, as {unmatched[0]}")
        if self.index is not None:
            load_shards(self.index, targets, processes)
            return
        for name, target in targets.items():
            if self.mapped[name].shape != target.shape:
                raise CheckpointError(
                    f"it belongs to another network: {name} is {tuple(self.mapped[name].shape)}, "
                    f"expected {tuple(target.shape)}"
                )
            copy_whole(self.mapped[name], target)


def write_config(run_dir: Path, config: DistillConfig) -> None:
    """Write config.json of a run."""
    write_json(run_dir / CONFIG_FILE, config_to_dict(config))


def read_config(run_dir: Path) -> DistillConfig:
    """Read config.json of a run, in this format or an older one.

    Raises:
        ConfigError: there is no run, its config is damaged, or a newer version wrote it; the message names the file.
    """
    data = saved_settings(run_dir)
    try:
        return config_from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{run_dir / CONFIG_FILE}: {error}") from error


def saved_settings(run_dir: Path) -> Any:
    """Return config.json of a run as it stands.

    Raises:
        ConfigError: there is no run, or the file is no JSON object.
    """
    path = run_dir / CONFIG_FILE
    if not path.exists():
        raise ConfigError(f"{run_dir} holds no run: it has no {CONFIG_FILE}")
    return read_json_object(path, ConfigError)


def check_resumable(saved: DistillConfig, wanted: DistillConfig) -> None:
    """Check that a run may be resumed with other settings.

    Raises:
        ConfigError: a setting differs that changes what is computed; the message names the first.
    """
    before, after = config_to_dict(saved), config_to_dict(wanted)
    for key, value in before.items():
        if key not in RESUMABLE and after[key] != value:
            raise ConfigError(
                f"cannot resume with another {key}: the run has {value!r}, got {after[key]!r}; "
                f"only {', '.join(RESUMABLE)} may change"
            )


def save_checkpoint(
    run_dir: Path,
    iteration: int,
    staged: dict[str, StagedShard],
    values: dict[str, Any],
    keep_last: int,
    processes: Processes = SINGLE_PROCESS,
    score: Score | None = None,
) -> Path:
    """Write a checkpoint atomically, then delete all but the newest and the best; every rank calls it.

    Args:
        run_dir: the run's folder.
        iteration: iterations done.
        staged: this rank's shards.
        values: plain JSON values, equal on all ranks.
        keep_last: how many of the newest checkpoints stay, 1 or more.
        processes: of the run.
        score: on rank 0, what tells which checkpoint is best.

    Returns:
        Its folder.

    Raises:
        CheckpointError: it cannot be written; older checkpoints are untouched.
    """
    folder = checkpoint_folder(run_dir, iteration)

    def clean() -> None:
        # A killed save leaves its temporary folder behind, which would fill the disk.
        for unfinished in (*leftovers(folder.parent), *folder.parent.glob(f".{STEP_PREFIX}*.partial")):
            shutil.rmtree(unfinished, ignore_errors=True)

    def prune() -> None:
        if score is not None:
            _note_best(run_dir, iteration, score)
        _delete_old(run_dir, keep_last)

    if processes.is_rank0:
        clean()
    try:
        save_shards(folder, staged, values, processes)
        processes.broadcast_in_save_group(prune)
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be written: {first_line(error)}") from error
    return folder


def checkpoint_folder(run_dir: Path, iteration: int) -> Path:
    """Return the folder of the checkpoint of an iteration."""
    return run_dir / "checkpoints" / f"{STEP_PREFIX}{iteration:08d}"


def iteration_of(folder: Path) -> int:
    """Return the iteration of a checkpoint's folder."""
    return int(folder.name.removeprefix(STEP_PREFIX))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{STEP_PREFIX}*"))


def best_iteration(run_dir: Path) -> int | None:
    """Return the iteration of the best checkpoint; None where no metric has chosen one.

    Raises:
        CheckpointError: best.json is damaged.
    """
    best = _read_best(run_dir)
    return None if best is None else int(best["iteration"])


def _read_best(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / BEST_FILE
    if not path.exists():
        return None
    best = read_json_object(path, CheckpointError)
    if type(best.get("iteration")) is not int or not isinstance(best.get("value"), int | float):
        raise CheckpointError(f"{path} is damaged: delete it to choose the best checkpoint anew")
    return best


def _note_best(run_dir: Path, iteration: int, score: Score) -> None:
    if not math.isfinite(score.value):
        return
    best = _read_best(run_dir)
    # Another metric, or one that was measured after the point that a resumed run starts at.
    is_comparable = best is not None and best.get("metric") == score.metric and best["iteration"] < iteration
    if best is None or not is_comparable or is_better(score.value, best["value"], score.better):
        write_json(run_dir / BEST_FILE, {"iteration": iteration, **score._asdict()})


def _delete_old(run_dir: Path, keep_last: int) -> None:
    best = best_iteration(run_dir)
    for old in list_checkpoints(run_dir)[:-keep_last]:
        if iteration_of(old) == best:
            continue
        # Renamed first: a killed deletion must not leave half a checkpoint under its name.
        doomed = old.rename(old.with_name(f"{TEMPORARY_PREFIX}{old.name}.partial"))
        shutil.rmtree(doomed)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint; no tensor is read yet.

    Raises:
        CheckpointError: it is damaged, incomplete or of another kind.
    """
    if (folder / INDEX_FILE).exists():
        index = read_index(folder)
        return Checkpoint(folder=folder, values=index.values, index=index, mapped={})
    return _load_single_file(folder)


def _load_single_file(folder: Path) -> Checkpoint:
    """Map the state.pt of an older version, with tensors and values under the names of today."""
    path = folder / STATE_FILE
    remedy = f"delete {folder.name} to go on from an older checkpoint"
    if not path.exists():
        raise CheckpointError(f"checkpoint {folder} is incomplete: it has no {INDEX_FILE}; {remedy}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle, torch and the file system each raise their own kinds
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}; {remedy}") from error
    try:
        own = state["trainer"]
        tensors = {f"ema/{name}": tensor for name, tensor in own["ema"]["shadow"].items()}
        for role, network in own["networks"].items():
            tensors |= {f"networks/{role}/{name}": tensor for name, tensor in network.items()}
            names = list(network)
            for place, moments in own["optimizers"][role]["state"].items():
                tensors |= {f"optimizers/{role}/{key}/{names[place]}": value for key, value in moments.items()}
        values = {
            # Checkpoints of settings format 1 call it step.
            "iteration": int(own["iteration"] if "iteration" in own else own["step"]),
            "updates": dict(own["updates"]),
            "num_skipped": int(own["num_skipped"]),
            "nonfinite_in_row": dict(own["nonfinite_in_row"]),
            "ema_updates": int(own["ema"]["num_updates"]),
            "elapsed_s": float(state["elapsed_s"]),
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a training checkpoint") from error
    return Checkpoint(folder=folder, values=values, index=None, mapped=tensors)
