"""Student step of dp-dmd: the first step of the rollout follows the teacher, the later ones match its distribution.

Deterministic: every random number comes in through `StepDraws`. Knows neither optimizers nor files. The critic's step
is that of step.py. Layout: B batch, C channels, F latent frames, H, W latent pixels, L positions, D text width.
"""

from itertools import pairwise

import torch
from torch import Tensor

from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, shift_sigma
from distill.config import DistillConfig
from distill.data.prompts import Batch
from distill.losses.dmd import dmd_loss
from distill.losses.trajectory import trajectory_loss
from distill.methods.matching import StepDraws, StepResult, score_metrics, score_sample, student_sample
from distill.networks.build import Networks, denoiser, guided_teacher_flow


def dp_dmd_student_step(networks: Networks, batch: Batch, draws: StepDraws, config: DistillConfig) -> StepResult:
    """Distribution matching at an exit step after the first, plus the diversity term on the first.

    Args:
        networks: the student gets the gradient; teacher and critic are only evaluated.
        batch: prompts.
        draws: random numbers; exit_step is 1 or more, so that the first step is never matched.
        config: the run's settings.

    Returns:
        Loss L_dmd + dp_dmd.weight * L_trajectory and metrics loss_dmd, loss_trajectory and those of `score_metrics`.

    Source: DP-DMD, dpdmd@d8f75c9: matching collapses the mode that the first step has to choose, so that step gets
    the teacher's choice as its only target. Deviation: matching reaches one exit step, as everywhere in this package,
    where theirs goes back through all steps after the first.
    """
    denoise = denoiser(networks.student, networks.precision)
    first: list[Tensor] = []

    def keep_first_graph(latents: Tensor, timestep_B: Tensor, prompt_embeds_BLD: Tensor) -> Tensor:
        # The rollout runs its early steps without gradient; the first one has a loss of its own, and runs once.
        if first:
            return denoise(latents, timestep_B, prompt_embeds_BLD)
        with torch.enable_grad():
            first.append(denoise(latents, timestep_B, prompt_embeds_BLD))
        return first[0].detach()

    grid = config.grid()
    student_x0 = student_sample(keep_first_graph, batch, draws, grid, config.sampler, with_grad=True)
    scores = score_sample(networks, batch, student_x0, draws, config)
    loss_dmd = dmd_loss(student_x0, scores.direction)
    start = grid.sigmas[0] * draws.rollout_noise[0]
    levels = teacher_levels(config)
    teacher_state = early_trajectory(networks, batch, start, levels, config.guidance_scale)
    loss_trajectory = trajectory_loss(first[0], start, teacher_state, levels[0], levels[-1])
    metrics = {
        "loss_dmd": loss_dmd.detach(),
        "loss_trajectory": loss_trajectory.detach(),
        **score_metrics(student_x0, scores),
    }
    return StepResult(loss=loss_dmd + config.dp_dmd.weight * loss_trajectory, metrics=metrics)


def teacher_levels(config: DistillConfig) -> tuple[float, ...]:
    """Return the dp_dmd.match_step + 1 noise levels of the teacher's first steps, from the student's first level."""
    settings, start = config.dp_dmd, config.grid().sigmas[0]
    unshifted = shift_sigma(start, 1.0 / settings.shift)
    later = (
        shift_sigma(unshifted * (1.0 - index / settings.teacher_steps), settings.shift)
        for index in range(1, settings.match_step + 1)
    )
    return (start, *later)


@torch.no_grad()
def early_trajectory(
    networks: Networks, batch: Batch, start: Tensor, levels: tuple[float, ...], guidance_scale: float
) -> Tensor:
    """Return where Euler steps of the guided teacher lead from `start`, at levels[0]: a state at levels[-1]."""
    denoise = denoiser(networks.teacher, networks.precision)
    latents = start
    for sigma, lower_sigma in pairwise(levels):
        flow = guided_teacher_flow(
            denoise,
            latents,
            torch.full((latents.shape[0],), NUM_TRAIN_TIMESTEPS * sigma, device=latents.device),
            batch.prompt_embeds,
            batch.negative_prompt_embeds,
            guidance_scale,
        )
        latents = latents + (lower_sigma - sigma) * flow
    return latents
