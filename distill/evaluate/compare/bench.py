"""Scores one cell of a comparison in an analytic world, after every step, against the law or the guided teacher's.

Legend: P captions, S samples of one caption, K steps; C channels, F frames, H, W rows and columns.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from codmd_serve.files import atomic_file
from codmd_serve.wan.checkpoint import load_module, read_spec
from distill.config import ANALYTIC_RECIPES, DistillConfig
from distill.evaluate.compare.table import START, TEACHER, TRUTH, Arm
from distill.networks.base import open_base
from distill.networks.build import denoiser
from distill.worlds.analytic.makers import make_world
from distill.worlds.analytic.metrics import Judge, copying
from distill.worlds.analytic.network import AnalyticNetwork
from distill.worlds.analytic.sampling import initial_noise, law_samples, student_samples, teacher_samples
from distill.worlds.analytic.world import GaussianWorld

# Of the reference, of noise and of exact samples, far from each other and from any seed of a run.
REFERENCE_SEED, NOISE_SEED, TRUTH_SEED = 999, 10_000, 20_000
REFERENCE_STEPS, COPIED_STEPS = 100, 50
ERRORS = ("tau_err", "frame_rho", "cross_rho", "kept_err", "w1", "energy", "mode_tv", "mode_miss")
"""What a table may test; 0 is right."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What all cells of one guidance scale are scored against.

    Attributes:
        world: of the cells.
        guidance_scale: 1.0 has the law itself as reference, any other 100 Euler steps of the guided exact teacher,
            whose law a student is asked to match.
        num_samples: S.
        cache_dir: keeps what takes seconds to sample.
    """

    world: GaussianWorld
    guidance_scale: float
    num_samples: int
    cache_dir: Path

    def score_arm(
        self, arm: Arm, config: DistillConfig, seed: int, bundle: Path | None, folder: Path, *, is_tested: bool = True
    ) -> dict[str, Any]:
        """Return the scores: steps, after each step `metrics.Scores`, kept_err, copying; and `Judge.matrices`.

        Args:
            arm: of the cell.
            config: of the run, or of the baseline for an arm that trains nothing.
            seed: of noise and exact samples; all arms of a seed begin with the same noise.
            bundle: the student of a run.
            folder: unused, there are no pictures.
            is_tested: without it, a point of a curve: after the last step alone, and no matrices.

        Raises:
            CheckpointError: the bundle is missing or damaged.
        """
        del folder
        steps = self._samples(arm, config, seed, bundle)
        teacher = self._endpoints(seed)
        if not is_tested:
            return {"steps": [self._scores(steps[-1], teacher)]}
        matrices = {
            name: [[round(value, 4) for value in row] for row in matrix.tolist()]
            for name, matrix in self.judge.matrices(steps[-1]).items()
        }
        return {"steps": [self._scores(x0, teacher) for x0 in steps], "matrices": matrices}

    def _samples(self, arm: Arm, config: DistillConfig, seed: int, bundle: Path | None) -> list[Tensor]:
        world = self.world
        if arm.kind == TRUTH:
            if self.guidance_scale == 1.0:
                return [law_samples(world, self.num_samples, TRUTH_SEED + seed)]
            return self._teacher(TRUTH_SEED + seed, REFERENCE_STEPS)[-1:]
        if arm.kind == TEACHER:
            return self._teacher(NOISE_SEED + seed, arm.steps)[-4:]
        if arm.kind == START:
            grid, sampler = config.grid(), config.sampler
            network = open_base(config.base).prepared(self.cache_dir).load_transformer(torch.float32)
            sigmas, timesteps = grid.sigmas, grid.timesteps
        else:
            assert bundle is not None
            spec = read_spec(bundle)
            sigmas, timesteps, sampler = spec.sigmas, spec.timesteps, spec.sampler
            network = load_module(AnalyticNetwork, bundle, "transformer").float()
        noise = initial_noise(world, self.num_samples, len(timesteps), NOISE_SEED + seed)
        return student_samples(world, denoiser(network.eval(), "fp32"), noise, sigmas, timesteps, sampler)

    def _teacher(self, seed: int, num_steps: int) -> list[Tensor]:
        (noise,) = initial_noise(self.world, self.num_samples, 1, seed)
        return teacher_samples(self.world, noise, self.guidance_scale, num_steps)

    def _scores(self, x0: Tensor, teacher: Tensor) -> dict[str, Any]:
        scores = asdict(self.judge.score(x0))
        return {**scores, "kept_err": abs(scores["kept"] - 1.0), "copying": copying(x0, teacher)}

    @cached_property
    def judge(self) -> Judge:
        """The judge of this guidance scale."""
        return Judge(self.world, self.reference())

    def reference(self) -> Tensor:
        """Return the reference, (P, S, C, F, H, W)."""
        if self.guidance_scale == 1.0:
            return law_samples(self.world, self.num_samples, REFERENCE_SEED)
        return self._kept("reference", lambda: self._teacher(REFERENCE_SEED, REFERENCE_STEPS)[-1])

    def _endpoints(self, seed: int) -> Tensor:
        """Return what the teacher makes, in many steps, of the noise that the arms of a seed begin with."""
        return self._kept(f"endpoints-{seed}", lambda: self._teacher(NOISE_SEED + seed, COPIED_STEPS)[-1])

    def _kept(self, name: str, make: Any) -> Tensor:
        law = hashlib.sha256(self.world.means.mul(1e4).round().long().numpy().tobytes()).hexdigest()[:8]
        key = f"{self.world.name}-{law}-g{self.guidance_scale:g}-n{self.num_samples}"
        path = self.cache_dir / f"analytic-{name}-{key}.safetensors"
        if path.is_file():
            return load_file(path)["x0"]
        x0: Tensor = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            save_file({"x0": x0.contiguous()}, temporary)
        return x0


@cache
def open_bench(recipe: str, guidance_scale: float, num_samples: int, cache_dir: Path) -> Bench:
    """Return the bench of a recipe; one for each process."""
    world = make_world(ANALYTIC_RECIPES[recipe])
    return Bench(world=world, guidance_scale=guidance_scale, num_samples=num_samples, cache_dir=cache_dir)
