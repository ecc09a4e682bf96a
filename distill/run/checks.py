"""What a run checks before it builds a network: the base's latents, its teacher, and the folder that it will write."""

import os
from pathlib import Path

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.networks.base import Base
from distill.networks.teacher import check_teacher
from distill.parallel.sharding import check_token_split
from distill.run.checkpoint import CONFIG_FILE, check_resumable, read_config, write_config


def native_latents(config: DistillConfig, base: Base) -> tuple[int, ...]:
    """Return (C, F, H, W) of the latents of the config's native video.

    Raises:
        CheckpointError: the base is missing or has no transformer.
        ConfigError: the size does not fit VAE and patches, its tokens cannot be split over context_parallel ranks, or
            the teacher does not fit the base.
    """
    shape = base.latent_shape(config.native)
    check_teacher(config, base)
    if base.has_blocks:
        check_token_split(config, base.transformer_entry("num_attention_heads"), base.num_tokens(config.native))
    return shape


def start_folder(out: Path, config: DistillConfig) -> None:
    """Make the folder of a run, which from now on can be resumed."""
    out.mkdir(parents=True, exist_ok=True)
    write_config(out, config)


def check_out(config: DistillConfig, out: Path, resume: bool) -> None:
    """Refuse a folder that cannot be resumed or written, or that holds another run.

    Raises:
        ConfigError: the message names the folder.
    """
    holds_run = (out / CONFIG_FILE).is_file()
    if resume:
        check_resumable(read_config(out), config)
    elif holds_run:
        raise ConfigError(f"{out} already holds a run: resume it or name another folder")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"{out} cannot be written: {nearest} is no folder or is read-only")
