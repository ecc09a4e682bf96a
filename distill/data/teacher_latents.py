"""Samples of the teacher to train on: one for each training prompt, made once, cached on disk in shards.

Knows no loss and no training loop. Legend: N samples, B batch, C channels, F latent frames, H, W latent pixels.

CACHE/teacher-latents-KEY/00000.safetensors      samples of prompts 0 to 63, complete or absent
"""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from codmd_serve.errors import CheckpointError
from codmd_serve.files import atomic_file
from codmd_serve.sampler import rollout
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, shift_sigma
from distill.config import DistillConfig
from distill.data.prompts import PromptData, add_module_files, load_prompts, prompt_key
from distill.networks.base import Base
from distill.networks.build import Networks, denoiser, guided_teacher_flow
from distill.parallel.processes import SINGLE_PROCESS, Processes
from distill.streams import named_rng

SHARD_SIZE = 64
SAMPLE_BATCH = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSampling:
    """How samples are made: num_steps Euler steps of the guided teacher at levels moved by `shift`."""

    num_steps: int
    shift: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLatents:
    """A folder of shards; sample i is row i % SHARD_SIZE of shard i // SHARD_SIZE."""

    folder: Path

    def batch(self, indices: list[int], device: torch.device) -> Tensor:
        """Read the samples of some prompts, (B, C, F, H, W) float32.

        Raises:
            CheckpointError: a shard has gone or is damaged, or a sample is not finite.
        """
        return torch.stack([self._sample(index) for index in indices]).to(device)

    def _sample(self, index: int) -> Tensor:
        shard, row = divmod(index, SHARD_SIZE)
        path = shard_path(self.folder, shard)
        try:
            # Memory-mapped: of a shard, only the row is read.
            with safe_open(path, framework="pt") as file:
                sample: Tensor = file.get_slice("x0")[row]
        except (SafetensorError, OSError, IndexError) as error:
            raise CheckpointError(f"teacher sample {index} cannot be read from {path}: {error}") from error
        if not bool(sample.isfinite().all()):
            raise CheckpointError(
                f"teacher sample {index} in {path} is not finite: delete the file to have it made anew"
            )
        return sample


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"{shard:05d}.safetensors"


def cached_teacher_latents(
    config: DistillConfig,
    sampling: TeacherSampling,
    base: Base,
    networks: Networks,
    data: PromptData,
    shape: tuple[int, ...],
    cache_dir: Path,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> TeacherLatents:
    """Return samples of the teacher for all training prompts, sampling those that the cache does not have.

    Args:
        config: its guidance_scale guides the teacher; its precision must be resolved.
        sampling: steps of the teacher.
        base: of the networks; the samples are cached under its files.
        networks: the teacher is sampled.
        data: embeddings of the prompts.
        shape: (C, F, H, W) of the latents.
        cache_dir: the shards go to a folder in it, whose name follows from all that they depend on. The run's seed is
            not among it: noise is a function of the prompt's position.
        device: where the networks are.
        processes: of the run; if the teacher is sharded over them, all compute all samples and the first writes them.

    Returns:
        The samples, all on disk.

    Raises:
        CheckpointError: a shard cannot be written, or a sample is not finite.

    An interrupted call has lost the shard it was at; the next call goes on there.
    """
    folder = cache_dir / f"teacher-latents-{_cache_key(config, sampling, base)[:16]}"
    num_shards = -(-data.num_prompts // SHARD_SIZE)
    sizes = [min(SHARD_SIZE, data.num_prompts - shard * SHARD_SIZE) for shard in range(num_shards)]
    wanted = [
        shard for shard, size in enumerate(sizes) if not _holds_samples(shard_path(folder, shard), (size, *shape))
    ]
    # Nobody writes before all have looked.
    processes.all_reduce_max(len(wanted))
    if wanted and processes.is_rank0:
        logger.info("sampling teacher prompts=%d shards=%d folder=%s", data.num_prompts, len(wanted), folder.name)
    hidden = None if processes.is_rank0 else True
    for shard in tqdm(wanted, desc="samples of the teacher", unit="shard", disable=hidden, dynamic_ncols=True):
        x0 = _sample_shard(config, sampling, networks, data, shard, (sizes[shard], *shape), device)
        processes.on_rank0(partial(_write_shard, folder, shard, x0))
    return TeacherLatents(folder=folder)


def _write_shard(folder: Path, shard: int, x0: Tensor) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(shard_path(folder, shard)) as temporary:
            save_file({"x0": x0}, temporary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"samples of the teacher cannot be written to {folder}: {error}") from error


def _sample_shard(
    config: DistillConfig,
    sampling: TeacherSampling,
    networks: Networks,
    data: PromptData,
    shard: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    noise = torch.randn(shape, generator=named_rng(0, "teacher-latents", shard))
    teacher = denoiser(networks.teacher, networks.precision)
    levels = [1.0 - index / sampling.num_steps for index in range(sampling.num_steps + 1)]
    sigmas = [shift_sigma(level, sampling.shift) for level in levels]
    parts = []
    for start in range(0, shape[0], SAMPLE_BATCH):
        part = noise[start : start + SAMPLE_BATCH].to(device)
        first = shard * SHARD_SIZE + start
        batch = data.batch(list(range(first, first + len(part))), device)

        def denoise(
            latents: Tensor, timestep_B: Tensor, embeds_BLD: Tensor, negative_BLD: Tensor = batch.negative_prompt_embeds
        ) -> Tensor:
            return guided_teacher_flow(teacher, latents, timestep_B, embeds_BLD, negative_BLD, config.guidance_scale)

        timesteps = [NUM_TRAIN_TIMESTEPS * sigma for sigma in sigmas[:-1]]
        with torch.no_grad():
            parts.append(rollout(denoise, part[None], batch.prompt_embeds, sigmas, timesteps, sampler="ode").cpu())
    x0 = torch.cat(parts).float()
    if not bool(x0.isfinite().all()):
        raise CheckpointError(f"samples of the teacher {config.base} are not finite: check its weights and precision")
    return x0


def _holds_samples(path: Path, shape: tuple[int, ...]) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            samples = file.get_slice("x0")
            found, dtype = tuple(samples.get_shape()), samples.get_dtype()
    except (SafetensorError, OSError) as error:
        logger.warning("shard made anew path=%s reason=%s", path.name, error)
        return False
    return found == shape and dtype == "F32"


def _cache_key(config: DistillConfig, sampling: TeacherSampling, base: Base) -> str:
    prompts = [*load_prompts(config), config.negative_prompt]
    settings = [
        prompt_key(prompts, config, base),
        dataclasses.asdict(config.native),
        sampling.num_steps,
        sampling.shift,
        config.guidance_scale,
        config.teacher_dtype,
        config.precision,
        None if base.is_local else base.source,
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    add_module_files(digest, base.folder, ("transformer",))
    return digest.hexdigest()
