"""How well the teacher has learnt what captions leave open, measured while it trains.

At a snapshot the device draws clips of a few held-out captions, unguided; worker processes detect the objects in them
and read the factors off, so that training waits for the drawing only. Every row of the JSON file is one snapshot.

Legend: D captions, S seeds, F factors.
"""

import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from codmd_serve.files import write_json
from codmd_serve.sampler import Denoise, rollout
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, shift_sigma
from distill.evaluate.joint import FACTORS, TIED_PAIRS, dependence_distance, marginal_distances, pair_taus
from distill.evaluate.shapebench import SuiteConfig, plan_suite
from distill.networks.build import denoiser
from distill.pretrain.curve_plot import CURVE_PICTURE, plot_factor_curve
from distill.pretrain.curve_worker import ignore_interrupts, measure_clip, measure_truth
from distill.pretrain.prompts import PromptTable
from distill.pretrain.whole_clip import decode_clip

NUM_CAPTIONS = 4
DECODE_BATCH = 16
TRUTH_PER_SEED = 2
CURVE_TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Row:
    head: dict[str, float | None]
    factors: list["Future[tuple[np.ndarray, bool]]"]


class FactorCurve:
    """Measures snapshots of a teacher in worker processes and writes the rows that are finished.

    Use as a context manager: leaving it waits a little for the last row.
    """

    def __init__(self, path: Path, num_seeds: int, num_workers: int, seed: int) -> None:
        self.path, self.num_seeds, self.seed = path, num_seeds, seed
        suite = plan_suite(SuiteConfig(num_captions=2, depth_captions=NUM_CAPTIONS, depth_seeds=2, seed=seed))
        self.captions = [suite.requests[suite.rows(index)[0]].caption for index in suite.depth]
        # No fork: the main process holds a GPU.
        self.executor = ProcessPoolExecutor(
            max(num_workers, 1), multiprocessing.get_context("spawn"), ignore_interrupts
        )
        self.truth = self._submit_truth()
        self.rows: list[_Row] = []

    def __enter__(self) -> "FactorCurve":
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + CURVE_TIMEOUT_S
        while not self.write() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.executor.shutdown(wait=True, cancel_futures=True)
        if self.path.is_file():
            plot_factor_curve(self.path, self.path.with_name(CURVE_PICTURE))

    def measure(
        self,
        head: dict[str, float | None],
        transformer: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        prompts: PromptTable,
        precision: str,
        levels: list[float],
        stop: Callable[[], bool],
    ) -> None:
        """Draw the clips of one snapshot now, and have them measured; nothing when told to stop.

        Args:
            head: what the row begins with.
            transformer: prepared, on the device, not compiled.
            vae: whose latents it was trained on.
            prompts: of `captions`, in their order.
            precision: fp32 or bf16.
            levels: noise levels of the sampler's steps, see `step_levels`.
            stop: asked between two steps.
        """
        try:
            clips = draw_clips(
                _stoppable(denoiser(transformer, precision), stop),
                vae,
                prompts,
                self.num_seeds,
                levels,
                precision,
                self.seed,
            )
        except _StoppedError:
            return
        futures = [
            self.executor.submit(measure_clip, caption, clip)
            for caption, of_caption in zip(self.captions, clips, strict=True)
            for clip in of_caption
        ]
        self.rows.append(_Row(head, futures))
        self.write()

    def write(self) -> bool:
        """Write all rows that are measured; return whether that is all of them."""
        finished = [row for row in self.rows if all(future.done() for future in row.factors)]
        if not all(future.done() for future in self.truth):
            return not self.rows
        truth = self._by_caption([future.result() for future in self.truth])
        rows = []
        for row in finished:
            measured = [future.result() for future in row.factors]
            all_right = float(np.mean([is_right for _, is_right in measured]))
            rows.append(
                row.head | {"all": all_right} | factor_distances(self._by_caption([f for f, _ in measured]), truth)
            )
        if rows:
            write_json(self.path, {"captions": self.captions, "seeds": self.num_seeds, "rows": rows})
        return len(finished) == len(self.rows)

    def _submit_truth(self) -> list["Future[np.ndarray]"]:
        return [
            self.executor.submit(measure_truth, caption, [self.seed, 31, index, number])
            for index, caption in enumerate(self.captions)
            for number in range(TRUTH_PER_SEED * self.num_seeds)
        ]

    def _by_caption(self, factors: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(np.stack(factors).reshape(len(self.captions), -1, len(FACTORS)))


def factor_distances(groups: list[np.ndarray], truth: list[np.ndarray]) -> dict[str, Any]:
    """Distance of measured factors from the truth's, per factor and per tied pair.

    Args:
        groups: D times (S, F).
        truth: D times (S', F).

    Returns:
        "tau" of every tied pair and "tau_truth", "tau_error", their mean distance, and "marginal", the Wasserstein
        distance of every factor in standard deviations of the truth, with its mean "marginal_error"; JSON values.
    """
    taus, wanted = pair_taus(groups), pair_taus(truth)
    names = ["-".join(pair) for pair in TIED_PAIRS]
    distances = np.stack([marginal_distances(own, true) for own, true in zip(groups, truth, strict=True)])
    means = {
        name: float(np.nanmean(column))
        for name, column in zip(FACTORS, distances.T, strict=True)
        if not np.isnan(column).all()
    }
    return {
        "tau": dict(zip(names, (None if np.isnan(t) else float(t) for t in taus[0]), strict=True)),
        "tau_truth": dict(zip(names, (None if np.isnan(t) else float(t) for t in wanted[0]), strict=True)),
        "tau_error": float(dependence_distance(taus, wanted)[0]),
        "marginal": means,
        "marginal_error": float(np.mean(list(means.values()))),
    }


class _StoppedError(Exception):
    """The run was told to stop while clips were drawn."""


def _stoppable(denoise: Denoise, stop: Callable[[], bool]) -> Denoise:
    def call(latents: Tensor, timestep_B: Tensor, embeds_BLD: Tensor) -> Tensor:
        if stop():
            raise _StoppedError
        return denoise(latents, timestep_B, embeds_BLD)

    return call


def step_levels(num_steps: int, sigma_shift: float) -> list[float]:
    """Noise levels of Euler steps on a uniform grid, shifted."""
    return [shift_sigma(1.0 - step / num_steps, sigma_shift) for step in range(num_steps)]


@torch.no_grad()
def draw_clips(
    denoise: Denoise,
    vae: AutoencoderKLWan,
    prompts: PromptTable,
    num_seeds: int,
    levels: list[float],
    precision: str,
    seed: int,
) -> np.ndarray:
    """Sample every prompt but the empty one, unguided, by Euler steps: uint8 (D, S, T, H, W, 3)."""
    from distill.pretrain.clips import CLIP_SHAPE

    device, num_captions = prompts.embeds.device, len(prompts.embeds) - 1
    frames = (CLIP_SHAPE[0] - 1) // vae.config.scale_factor_temporal + 1
    rows, columns = (size // vae.config.scale_factor_spatial for size in CLIP_SHAPE[1:3])
    shape = (1, num_captions * num_seeds, vae.config.z_dim, frames, rows, columns)
    noise = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    embeds = prompts.embeds[:-1].repeat_interleave(num_seeds, 0)
    timesteps = [NUM_TRAIN_TIMESTEPS * level for level in levels]
    latents = rollout(denoise, noise, embeds, [*levels, 0.0], timesteps, sampler="ode")
    mean, std = (
        torch.tensor(vae.config[f"latents_{name}"], device=device)[:, None, None, None] for name in ("mean", "std")
    )
    clips = []
    for start in range(0, len(latents), DECODE_BATCH):
        part = latents[start : start + DECODE_BATCH]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            pixels = decode_clip(vae, part * std + mean)
        clips.append(_to_bytes(pixels).cpu())
    stacked = torch.cat(clips).numpy()
    return stacked.reshape(num_captions, num_seeds, *stacked.shape[1:])


def _to_bytes(pixels: Tensor) -> Tensor:
    """float (B, 3, T, H, W) in [-1, 1] to uint8 (B, T, H, W, 3)."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
