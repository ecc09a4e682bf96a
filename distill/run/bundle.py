"""The student of a run as a bundle for codmd_serve, and as a diffusers folder; knows no training loop."""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

import codmd_serve
from codmd_serve.device import DTYPES_BY_NAME
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import TEMPORARY_PREFIX, first_line
from codmd_serve.wan.checkpoint import NativeShape, StudentSpec, save_bundle
from codmd_serve.wan.pipeline import check_stock_pipeline, save_pipeline
from codmd_serve.wan.preview import preview_map_of_base
from distill.config import DistillConfig, settings_digest
from distill.data.prompts import caption_grammar
from distill.networks.base import Base, open_base
from distill.networks.teacher import teacher_name
from distill.run.adapters import EMA_PREFIX, whole_weights, write_lora
from distill.run.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    iteration_of,
    list_checkpoints,
    load_checkpoint,
    read_config,
    saved_settings,
)

logger = logging.getLogger(__name__)


class CheckpointEma(Mapping[str, Tensor]):
    """The moving average in a checkpoint, by parameter name; each access reads one tensor from disk.

    So the memory of an export is that of the network it makes, and not of the state it comes from.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.names = [name.removeprefix(EMA_PREFIX) for name in checkpoint.names() if name.startswith(EMA_PREFIX)]

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.read(EMA_PREFIX + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


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
        base_model=teacher_name(config, base),
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
    ema_weights: Mapping[str, Tensor],
    num_student_updates: int,
    config_sha256: str | None = None,
) -> None:
    """Write a student bundle that codmd_serve loads.

    Args:
        bundle_dir: its folder; one that exists is replaced.
        config: of the run.
        base: of the run.
        ema_weights: float32 moving average by parameter name, of a LoRA student that of its adapters; each is read
            once and not kept.
        num_student_updates: updates of the student so far.
        config_sha256: digest of the run's config.json; None where this version wrote it.

    Raises:
        CheckpointError: the base is gone, or what a LoRA student started from; the weights do not fit it, or the
            bundle cannot be written.
    """
    bundle_dir = bundle_dir.absolute()
    spec = student_spec(bundle_dir, config, base, num_student_updates, config_sha256)
    if base.has_vae:
        spec = replace(spec, preview_map=preview_map_of_base(base.folder))
    try:
        transformer = base.empty_transformer()
        dtype = DTYPES_BY_NAME[config.bundle_dtype]
        whole = whole_weights(config, base, ema_weights)
        weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in whole}
        transformer.load_state_dict(weights, assign=True)
        save_bundle(bundle_dir, transformer, spec, caption_grammar(config))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"bundle {bundle_dir} cannot be written: {first_line(error)}") from error


def export_bundle(run_dir: Path, bundle_dir: Path, iteration: int | None = None, base: Base | None = None) -> int:
    """Write the bundle of a run from one of its checkpoints.

    Args:
        run_dir: the run's folder.
        bundle_dir: where the bundle goes.
        iteration: which checkpoint; None is the newest.
        base: of the run; None opens it.

    Returns:
        The iteration of the checkpoint.

    Raises:
        ConfigError: there is no run.
        CheckpointError: no such checkpoint, or it is damaged.
    """
    config = read_config(run_dir)
    chosen, checkpoint = _checkpoint_of(run_dir, iteration)
    # Of the file as it stands: a run of an older format keeps the digest that its bundles have.
    digest = settings_digest(saved_settings(run_dir))
    num_updates = checkpoint.values["updates"]["student"]
    write_bundle(bundle_dir, config, base or open_base(config.base), CheckpointEma(checkpoint), num_updates, digest)
    return chosen


def _checkpoint_of(run_dir: Path, iteration: int | None) -> tuple[int, Checkpoint]:
    kept = [iteration_of(folder) for folder in list_checkpoints(run_dir)]
    if not kept or (iteration is not None and iteration not in kept):
        raise CheckpointError(
            f"{run_dir} has no checkpoint of iteration {'any' if iteration is None else iteration}, "
            f"kept are: {', '.join(map(str, kept)) or 'none'}"
        )
    chosen = kept[-1] if iteration is None else iteration
    return chosen, load_checkpoint(checkpoint_folder(run_dir, chosen))


def export_lora(run_dir: Path, folder: Path, iteration: int | None = None) -> int:
    """Write the adapters of a LoRA student alone; diffusers' `load_lora_weights` and `codmd-serve convert` read them.

    Args:
        run_dir: the run's folder.
        folder: where to; one that exists is replaced.
        iteration: which checkpoint; None is the newest.

    Returns:
        The iteration of the checkpoint.

    Raises:
        ConfigError: there is no run, or its student is no LoRA.
        CheckpointError: no such checkpoint, it is damaged, or the folder cannot be written.
    """
    config = read_config(run_dir)
    if not config.lora_student_rank:
        raise ConfigError(
            f"{run_dir} trains a full student, which has no adapters: export it as a bundle, or train one with "
            "--set lora_student_rank=64"
        )
    chosen, checkpoint = _checkpoint_of(run_dir, iteration)
    digest, num_updates = settings_digest(saved_settings(run_dir)), checkpoint.values["updates"]["student"]
    spec = student_spec(folder.absolute(), config, open_base(config.base), num_updates, digest)
    write_lora(folder, config, CheckpointEma(checkpoint), spec, caption_grammar(config))
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
