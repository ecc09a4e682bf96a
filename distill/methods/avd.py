"""AVD: regression of the student on real videos, less on outliers, and a term against clips that stand still.

Owns its settings, the running means of the regression's error and its loss. Every random number comes in.

Legend: B batch, K levels of the student.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from codmd_serve.grid import StepGrid
from codmd_serve.schedule import add_noise
from distill.data.prompts import Batch
from distill.losses.motion import adaptive_weights, flow_errors, moved_means
from distill.methods.draws import StepResult
from distill.networks.build import Networks, denoiser
from distill.settings import check_range

# Name of its running means in `Turn.memory`, and what they are before the first error.
ERROR_MEANS, NO_ERROR = "error_means", -1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AvdConfig:
    """The terms of AVD; a weight of 0 leaves the term out.

    Attributes:
        regression_weight: of the regression on real videos at one of the student's levels.
        sharpness: a sample weighs 1 - sigmoid(sharpness * (error - mean error at its level)).
        error_decay: share of that mean that stays at each student update.
        motion_weight: of -log(variance over frames).
        motion_threshold: clips with a smaller value of -log(variance over frames) are left alone.
    """

    regression_weight: float = 0.0
    sharpness: float = 3.0
    error_decay: float = 0.95
    motion_weight: float = 0.0
    motion_threshold: float = 0.8

    def __post_init__(self) -> None:
        for name in ("regression_weight", "motion_weight"):
            check_range(f"terms.avd.{name}", getattr(self, name), 0.0, 1e4)
        check_range("terms.avd.sharpness", self.sharpness, 0.0, 1e4)
        check_range("terms.avd.error_decay", self.error_decay, 0.0, 0.99999)
        check_range("terms.avd.motion_threshold", self.motion_threshold, -100.0, 100.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionDraws:
    """Where the student is regressed: level (B,) int64 of its grid, and N(0, 1) noise of the size of the latents."""

    level: Tensor
    noise: Tensor


def regression_results(
    networks: Networks,
    batch: Batch,
    draws: RegressionDraws,
    grid: StepGrid,
    settings: AvdConfig,
    means_K: Tensor,
) -> Iterator[tuple[StepResult, Tensor]]:
    """Yield the regression's loss on a micro-batch, a graph of its own, with the error of each sample (B,).

    Args:
        networks: the student gets the gradient.
        batch: prompts, and x0, the real latents.
        draws: random numbers.
        grid: the student's levels.
        settings: weights.
        means_K: of the error at each level, before this batch; see `note_errors`.
    """
    assert batch.x0 is not None
    device = batch.x0.device
    sigma_B = torch.tensor(grid.sigmas[:-1], dtype=torch.float32, device=device)[draws.level]
    timestep_B = torch.tensor(grid.timesteps, dtype=torch.float32, device=device)[draws.level]
    latents = add_noise(batch.x0, draws.noise, sigma_B)
    flow_pred = denoiser(networks.student, networks.precision)(latents, timestep_B, batch.prompt_embeds)
    error_B = flow_errors(flow_pred, batch.x0, draws.noise)
    weight_B = adaptive_weights(error_B, means_K[draws.level], settings.sharpness, settings.error_decay)
    loss = (weight_B * error_B).mean()
    metrics = {"loss_regression": error_B.detach().mean(), "regression_weight": weight_B.mean()}
    yield StepResult(loss=settings.regression_weight * loss, metrics=metrics), error_B.detach()


def note_errors(means_K: Tensor, level_B: Tensor, error_B: Tensor, decay: float) -> None:
    """Move the running means by the errors of a whole batch, in place."""
    means_K.copy_(moved_means(means_K, level_B, error_B, decay))
