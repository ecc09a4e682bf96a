"""Run folders on disk: checkpoints to resume from, and the student bundle at the end; knows no training loop.

RUN/config.json                    the resolved DistillConfig
RUN/log.jsonl, curves.png          means of all metrics, and their plot (trainer.py, curves.py)
RUN/tensorboard/                   the same, and the previews
RUN/previews/                      pictures of the EMA student (previews.py)
RUN/start/                         the run of the regressed start, where `start.updates` asks for one
RUN/cache/                         embeddings of the prompts, unless --cache says otherwise
RUN/checkpoints/step-00000200/     state.pt after 200 iterations, complete or absent
RUN/bundle/                        the student, once the run has ended
RUN/pipeline/                      the same as a complete diffusers folder, where the stock pipeline can sample it
"""

import logging
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import codmd_serve
from codmd_serve.device import DTYPES_BY_NAME
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import TEMPORARY_PREFIX, atomic_folder, first_line, leftovers, write_json
from codmd_serve.textfiles import read_json_object
from codmd_serve.wan.checkpoint import NativeShape, StudentSpec, save_bundle
from codmd_serve.wan.pipeline import check_stock_pipeline, save_pipeline
from codmd_serve.wan.preview import preview_map_of_base
from distill.config import RESUMABLE, DistillConfig, config_to_dict, settings_digest
from distill.data.prompts import caption_grammar
from distill.methods.registry import config_from_dict
from distill.networks.base import Base, open_base

CONFIG_FILE = "config.json"
STATE_FILE = "state.pt"
STEP_PREFIX = "step-"

logger = logging.getLogger(__name__)


def write_config(run_dir: Path, config: DistillConfig) -> None:
    """Write config.json of a run."""
    write_json(run_dir / CONFIG_FILE, config_to_dict(config))


def read_config(run_dir: Path) -> DistillConfig:
    """Read config.json of a run, in this format or an older one.

    Raises:
        ConfigError: there is no run, its config is damaged, or a newer version wrote it; the message names the file.
    """
    data = _saved_settings(run_dir)
    try:
        return config_from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{run_dir / CONFIG_FILE}: {error}") from error


def _saved_settings(run_dir: Path) -> Any:
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


def save_checkpoint(run_dir: Path, iteration: int, state: dict[str, Any], keep_last: int) -> Path:
    """Write a checkpoint atomically, then delete all but the newest.

    Args:
        run_dir: the run's folder.
        iteration: iterations done.
        state: nested dicts and lists of tensors, numbers and text.
        keep_last: how many checkpoints stay, 1 or more.

    Returns:
        Its folder.

    Raises:
        CheckpointError: it cannot be written; older checkpoints are untouched.
    """
    folder = run_dir / "checkpoints" / f"{STEP_PREFIX}{iteration:08d}"
    # A killed save leaves its temporary folder behind, which would fill the disk. Older versions named it otherwise.
    for unfinished in (*leftovers(folder.parent), *folder.parent.glob(f".{STEP_PREFIX}*.partial")):
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        # Through an open file: given a path, torch reports a full disk as "unexpected pos 64 vs 0".
        with atomic_folder(folder) as fresh, (fresh / STATE_FILE).open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"checkpoint {folder} cannot be written: {first_line(error)}") from error
    for old in list_checkpoints(run_dir)[:-keep_last]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{STEP_PREFIX}*"))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU. Its tensors are memory-mapped, so a rank reads only the shards it needs.

    Raises:
        CheckpointError: it is damaged or of another kind.
    """
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle, torch and the file system each raise their own kinds
        raise CheckpointError(
            f"{path} cannot be loaded: {first_line(error)}; delete {folder.name} to go on from an older checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a training checkpoint")
    return state


def student_spec(
    bundle_dir: Path,
    config: DistillConfig,
    base: Base,
    num_student_updates: int,
    config_sha256: str | None = None,
) -> StudentSpec:
    """Return the student.json of a run's bundle.

    Args:
        bundle_dir: where the bundle goes.
        config: of the run.
        base: of the run.
        num_student_updates: updates of the student so far.
        config_sha256: digest of the run's config.json; None where this version wrote it.

    Raises:
        ConfigError: a setting that no bundle can have; a run calls this before its first iteration.
    """
    grid = config.grid()
    return StudentSpec(
        base=os.path.relpath(Path(base.source).resolve(), bundle_dir.resolve()) if base.is_local else base.source,
        sigmas=grid.sigmas,
        timesteps=grid.timesteps,
        sampler=config.sampler,
        native=NativeShape(
            height=config.native.height,
            width=config.native.width,
            num_frames=config.native.num_frames,
            fps=config.native.fps,
        ),
        method=config.method,
        base_model=base.name,
        step=num_student_updates,
        ema=True,
        config_sha256=config_sha256 or config.sha256(),
        package_version=codmd_serve.__version__,
        vocabulary_note=config.vocabulary_note,
    )


def write_bundle(
    bundle_dir: Path,
    config: DistillConfig,
    base: Base,
    ema_weights: dict[str, Tensor],
    num_student_updates: int,
    config_sha256: str | None = None,
) -> None:
    """Write a student bundle that codmd_serve loads.

    Args:
        bundle_dir: its folder; one that exists is replaced.
        config: of the run.
        base: of the run.
        ema_weights: float32 moving average by parameter name.
        num_student_updates: updates of the student so far.
        config_sha256: digest of the run's config.json; None where this version wrote it.

    Raises:
        CheckpointError: the base is gone, the weights do not fit it, or the bundle cannot be written.
    """
    bundle_dir = bundle_dir.absolute()
    spec = student_spec(bundle_dir, config, base, num_student_updates, config_sha256)
    spec = replace(spec, preview_map=preview_map_of_base(base.folder))
    try:
        with torch.device("meta"):
            transformer = WanTransformer3DModel.from_config(base.transformer_config)
        dtype = DTYPES_BY_NAME[config.bundle_dtype]
        weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in ema_weights.items()}
        transformer.load_state_dict(weights, assign=True)
        save_bundle(bundle_dir, transformer, spec, caption_grammar(config))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"bundle {bundle_dir} cannot be written: {first_line(error)}") from error


def export_bundle(run_dir: Path, bundle_dir: Path, iteration: int | None = None) -> int:
    """Write the bundle of a run from one of its checkpoints.

    Args:
        run_dir: the run's folder.
        bundle_dir: where the bundle goes.
        iteration: which checkpoint; None is the newest.

    Returns:
        The iteration of the checkpoint.

    Raises:
        ConfigError: there is no run.
        CheckpointError: no such checkpoint, or it is damaged.
    """
    config = read_config(run_dir)
    folders = {int(folder.name.removeprefix(STEP_PREFIX)): folder for folder in list_checkpoints(run_dir)}
    if not folders or (iteration is not None and iteration not in folders):
        kept = ", ".join(map(str, sorted(folders))) or "none"
        raise CheckpointError(
            f"{run_dir} has no checkpoint of iteration {'any' if iteration is None else iteration}, kept are: {kept}"
        )
    chosen = max(folders) if iteration is None else iteration
    state = load_checkpoint(folders[chosen])
    trainer = state["trainer"]
    # Of the file as it stands: a run of an older format keeps the digest that its bundles have.
    digest = settings_digest(_saved_settings(run_dir))
    weights, num_updates = trainer["ema"]["shadow"], trainer["updates"]["student"]
    write_bundle(bundle_dir, config, open_base(config.base), weights, num_updates, digest)
    return chosen


def write_pipeline(bundle: Path, folder: Path) -> None:
    """Write a bundle as a diffusers folder; log a warning where the stock pipeline cannot sample it.

    Raises:
        CheckpointError: the base is gone or incomplete, or the folder cannot be written.
    """
    try:
        save_pipeline(bundle, folder)
    except ConfigError as error:
        logger.warning("no diffusers folder written reason=%s", error)


def export_pipeline(run_dir: Path, folder: Path, iteration: int | None = None) -> int:
    """Write the student of a run as a folder that the stock `diffusers.WanPipeline` loads.

    Args:
        run_dir: the run's folder.
        folder: where to; one that exists is replaced.
        iteration: which checkpoint; None is the newest.

    Returns:
        The iteration of the checkpoint.

    Raises:
        ConfigError: there is no run, or the stock pipeline cannot sample its student.
        CheckpointError: no such checkpoint, it is damaged, or the folder cannot be written.
    """
    check_stock_pipeline(read_config(run_dir).grid().sigmas)
    # Beside the folder, which has room for the weights where the system's temporary folder may not.
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=parent) as temporary:
            bundle = Path(temporary) / "bundle"
            chosen = export_bundle(run_dir, bundle, iteration)
            save_pipeline(bundle, folder)
    except OSError as error:
        raise CheckpointError(f"pipeline {folder} cannot be written: {first_line(error)}") from error
    return chosen
