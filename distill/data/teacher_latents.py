"""Samples of the teacher to train on, and states on the way to them: made once, cached on disk in shards.

Knows no loss and no training loop. Legend: N samples, K kept levels, B batch, C channels, F latent frames, H, W latent
pixels.

CACHE/teacher-latents-KEY/00000.safetensors      x0 and states of samples 0 to 63, complete or absent
"""

import dataclasses
import hashlib
import json
import logging
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

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
from distill.data.prompts import Batch, PromptData, add_files, load_prompts, prompt_key
from distill.networks.base import Base
from distill.networks.build import Networks, denoiser, guided_teacher_flow
from distill.networks.teacher import open_teacher
from distill.parallel.processes import SINGLE_PROCESS, Processes
from distill.streams import named_rng

SHARD_SIZE = 64
# Shards that a process keeps open, well below the descriptors that it may have.
MAX_OPEN = 128

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSampling:
    """How samples are made: num_steps Euler steps of the guided teacher at levels moved by `shift`.

    Attributes:
        kept_sigmas: levels, descending, at which the states of the path are kept; the path steps on each of them.
        num_samples: sample i is of prompt i modulo their number; None is one sample for each prompt.
    """

    num_steps: int
    shift: float
    kept_sigmas: tuple[float, ...] = ()
    num_samples: int | None = None

    def sigmas(self) -> list[float]:
        """Return the levels of the path, descending to 0: those of the steps and those that are kept."""
        levels = [1.0 - index / self.num_steps for index in range(self.num_steps + 1)]
        sigmas = sorted((shift_sigma(level, self.shift) for level in levels), reverse=True)
        # A level of the steps gives way to a kept one that it differs from by rounding.
        own = [
            sigma for sigma in sigmas if not any(math.isclose(sigma, kept, abs_tol=1e-6) for kept in self.kept_sigmas)
        ]
        return sorted({*own, *self.kept_sigmas}, reverse=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLatents:
    """A folder of shards; sample i is row i % SHARD_SIZE of shard i // SHARD_SIZE.

    Attributes:
        num_samples: in all shards.
        has_states: whether states of the paths were kept.
    """

    folder: Path
    num_samples: int
    has_states: bool = False

    def batch(self, indices: list[int], device: torch.device) -> Tensor:
        """Read some samples, (B, C, F, H, W) float32.

        Raises:
            CheckpointError: a shard has gone or is damaged, or a sample is not finite.
        """
        return self._rows(indices, "x0").to(device)

    def states(self, indices: list[int], device: torch.device) -> Tensor:
        """Read the kept states on the way to some samples, (B, K, C, F, H, W) float32; raises as `batch`."""
        return self._rows(indices, "states").float().to(device)

    def _rows(self, indices: list[int], name: str) -> Tensor:
        shards = {shard: self._shard(shard, indices) for shard in {index // SHARD_SIZE for index in indices}}
        rows: list[Tensor] = []
        for index in indices:
            shard, row = divmod(index, SHARD_SIZE)
            try:
                # Memory-mapped: of a shard, only the row is read.
                rows.append(shards[shard].get_slice(name)[row])
            except (SafetensorError, OSError, IndexError) as error:
                raise self._unreadable(index, error) from error
        stacked = torch.stack(rows)
        if not bool(stacked.isfinite().all()):
            index = next(index for index, one in zip(indices, rows, strict=True) if not bool(one.isfinite().all()))
            raise CheckpointError(
                f"teacher sample {index} in {shard_path(self.folder, index // SHARD_SIZE)} is not finite: "
                "delete the file to have it made anew"
            )
        return stacked

    def _shard(self, shard: int, indices: list[int]) -> Any:
        path = shard_path(self.folder, shard)
        try:
            state = path.stat()
            return _opened(path, state.st_ino, state.st_mtime_ns)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(next(i for i in indices if i // SHARD_SIZE == shard), error) from error

    def _unreadable(self, index: int, error: Exception) -> CheckpointError:
        path = shard_path(self.folder, index // SHARD_SIZE)
        return CheckpointError(f"teacher sample {index} cannot be read from {path}: {error}")


@lru_cache(maxsize=MAX_OPEN)
def _opened(path: Path, inode: int, mtime_ns: int) -> Any:
    """Return a shard, kept open: opening it for each row took half the time of a batch. One replaced is another."""
    del inode, mtime_ns
    return safe_open(path, framework="pt")


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
    """Return samples of the teacher, sampling those that the cache does not have.

    Args:
        config: its guidance_scale guides the teacher; its precision must be resolved.
        sampling: steps of the teacher, how many samples, and what is kept of the way.
        base: of the run; the samples are cached under the files of its teacher.
        networks: the teacher is sampled.
        data: embeddings of the prompts.
        shape: (C, F, H, W) of the latents.
        cache_dir: the shards go to a folder in it, whose name follows from all that they depend on. The run's seed is
            not among it: noise is a function of samples_seed and the sample's position.
        device: where the networks are.
        processes: of the run. Each group of ranks that shares its samples makes and writes shards of its own; all
            groups sample as often, because a sharded teacher needs every rank.

    Returns:
        The samples, all on disk.

    Raises:
        CheckpointError: a shard cannot be written, or a sample is not finite.

    An interrupted call has lost the shards it was at, one of each group; the next call goes on there.
    """
    folder = cache_dir / f"teacher-latents-{latents_key(config, sampling, base)[:16]}"
    num_samples = sampling.num_samples or data.num_prompts
    sizes = [min(SHARD_SIZE, num_samples - first) for first in range(0, num_samples, SHARD_SIZE)]
    kept = len(sampling.kept_sigmas)
    wanted = [
        shard for shard, size in enumerate(sizes) if not _holds_samples(shard_path(folder, shard), (size, *shape), kept)
    ]
    # Nobody writes before all have looked.
    processes.all_reduce_max(len(wanted))
    if wanted and processes.is_rank0:
        logger.info("sampling teacher samples=%d shards=%d folder=%s", num_samples, len(wanted), folder.name)
    group, num_groups = processes.rank // processes.context_parallel, processes.data_parallel
    hidden = None if processes.is_rank0 else True
    rounds = range(0, len(wanted), num_groups)
    for first in tqdm(rounds, desc="samples of the teacher", unit="shard", disable=hidden, dynamic_ncols=True):
        # A group that has none left makes the last shard again, and does not write it.
        has_own = first + group < len(wanted)
        shard = wanted[first + group if has_own else -1]
        tensors = _sample_shard(config, sampling, networks, data, shard, (sizes[shard], *shape), device, processes)
        is_writer = has_own and processes.rank % processes.context_parallel == 0
        processes.on_all_ranks(partial(_write_shard, folder, shard, tensors, config, is_writer=is_writer))
    return TeacherLatents(folder=folder, num_samples=num_samples, has_states=kept > 0)


def _write_shard(
    folder: Path, shard: int, tensors: dict[str, Tensor], config: DistillConfig, *, is_writer: bool
) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise CheckpointError(
            f"samples of the teacher {config.teacher or config.base} are not finite: check its weights and precision"
        )
    if not is_writer:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(shard_path(folder, shard)) as temporary:
            save_file(tensors, temporary)
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
    processes: Processes,
) -> dict[str, Tensor]:
    """Return x0 (N, C, F, H, W) float32 and, where levels are kept, states (N, K, C, F, H, W) float16, on the CPU."""
    noise = torch.randn(shape, generator=named_rng(config.samples_seed, "teacher-latents", shard))
    # Sampled in the parts that the run trains in: what fits with gradient fits without.
    part_size = len(processes.positions(config.batch_size, config.accumulate, 0))
    parts = []
    for start in range(0, shape[0], part_size):
        first = shard * SHARD_SIZE + start
        part = noise[start : start + part_size].to(device)
        indices = [index % data.num_prompts for index in range(first, first + len(part))]
        parts.append(_sample_part(config, sampling, networks, data.batch(indices, device), part))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def _sample_part(
    config: DistillConfig, sampling: TeacherSampling, networks: Networks, batch: Batch, noise: Tensor
) -> dict[str, Tensor]:
    teacher = denoiser(networks.teacher, networks.precision)
    sigmas, states = sampling.sigmas(), list[Tensor]()
    levels = iter(sigmas)

    def denoise(latents: Tensor, timestep_B: Tensor, embeds_BLD: Tensor) -> Tensor:
        if next(levels) in sampling.kept_sigmas:
            states.append(latents.half().cpu())
        return guided_teacher_flow(
            teacher, latents, timestep_B, embeds_BLD, batch.negative_prompt_embeds, config.guidance_scale
        )

    timesteps = [NUM_TRAIN_TIMESTEPS * sigma for sigma in sigmas[:-1]]
    x0 = rollout(denoise, noise[None], batch.prompt_embeds, sigmas, timesteps, sampler="ode").float().cpu()
    return {"x0": x0, "states": torch.stack(states, dim=1)} if states else {"x0": x0}


def _holds_samples(path: Path, shape: tuple[int, ...], num_kept: int) -> bool:
    if not path.is_file():
        return False
    wanted = {"x0": (shape, "F32")}
    if num_kept:
        wanted["states"] = ((shape[0], num_kept, *shape[1:]), "F16")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        logger.warning("shard made anew path=%s reason=%s", path.name, error)
        return False
    return found == wanted


def latents_key(config: DistillConfig, sampling: TeacherSampling, base: Base) -> str:
    """Return the digest of all that samples of the teacher depend on, its files included."""
    prompts, teacher = [*load_prompts(config), config.negative_prompt], open_teacher(config, base)
    settings = [
        prompt_key(prompts, config, base),
        dataclasses.asdict(config.native),
        sampling.num_steps,
        sampling.shift,
        config.guidance_scale,
        *([list(sampling.kept_sigmas)] if sampling.kept_sigmas else []),
        config.teacher_dtype,
        config.precision,
        None if teacher.pipeline.is_local else teacher.pipeline.source,
        # Where it is not 0: samples that were made before there was a choice stay in use.
        *([config.samples_seed] if config.samples_seed else []),
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    add_files(digest, teacher.files())
    return digest.hexdigest()
