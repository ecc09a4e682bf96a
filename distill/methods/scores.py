"""What distribution matching shares: the student's rollout, its scores by critic and teacher, and the critic's loss.

Draws no random number: they come in through `StepDraws`.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from codmd_serve.grid import StepGrid
from codmd_serve.sampler import Denoise, rollout
from codmd_serve.schedule import add_noise, flow_to_x0
from distill.config import DistillConfig
from distill.data.prompts import Batch
from distill.losses.dmd import dmd_direction
from distill.losses.flow import flow_loss
from distill.methods.draws import StepDraws, StepResult
from distill.methods.exits import sample_at_exits
from distill.networks.build import Networks, denoiser, guided_teacher_flow


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What teacher and critic predict for a re-noised student sample, (B, C, F, H, W), without gradient.

    Attributes:
        direction: of `dmd_direction`.
        teacher_x0: clean prediction of the guided teacher.
        critic_x0: clean prediction of the critic.
    """

    direction: Tensor
    teacher_x0: Tensor
    critic_x0: Tensor


def student_sample(
    denoise: Denoise, batch: Batch, draws: StepDraws, grid: StepGrid, sampler: str, *, with_grad: bool
) -> Tensor:
    """Roll the student out to the drawn exit step; with_grad lets that step, and no other, carry gradient.

    Returns:
        x0_pred (B, C, F, H, W) of the exit step, float32 or wider.
    """
    if draws.exit_steps is not None:
        return sample_at_exits(denoise, batch, draws, grid, sampler, with_grad=with_grad)
    return rollout(
        denoise,
        draws.rollout_noise,
        batch.prompt_embeds,
        grid.sigmas,
        grid.timesteps,
        sampler=sampler,
        exit_step=draws.exit_step,
        grad_exit_step=with_grad,
    )


def score_sample(
    networks: Networks,
    batch: Batch,
    student_x0: Tensor,
    draws: StepDraws,
    config: DistillConfig,
    *,
    is_relative_to_state: bool = False,
) -> Scores:
    """Re-noise a student sample to the drawn level and evaluate critic and guided teacher there, without gradient.

    Args:
        networks: critic and teacher.
        batch: prompts.
        student_x0: (B, C, F, H, W) the sample.
        draws: noise and its level.
        config: the run's settings.
        is_relative_to_state: divide the direction by the teacher's distance from the noisy state, as DP-DMD does,
            instead of that from the sample.
    """
    with torch.no_grad():
        latents = add_noise(student_x0, draws.score_noise, draws.score_sigma)
        critic_flow = denoiser(networks.critic, networks.precision)(latents, draws.score_timestep, batch.prompt_embeds)
        teacher_flow = guided_teacher_flow(
            denoiser(networks.teacher, networks.precision),
            latents,
            draws.score_timestep,
            batch.prompt_embeds,
            batch.negative_prompt_embeds,
            config.guidance_scale,
        )
        reference = latents if is_relative_to_state else student_x0
        return Scores(
            direction=dmd_direction(reference, latents, teacher_flow, critic_flow, draws.score_sigma),
            teacher_x0=flow_to_x0(latents, teacher_flow, draws.score_sigma),
            critic_x0=flow_to_x0(latents, critic_flow, draws.score_sigma),
        )


def score_metrics(student_x0: Tensor, scores: Scores) -> dict[str, Tensor]:
    """Return score_gap_abs_mean, how far critic and teacher are apart in x0, and x0_std_ratio, the spread of the
    student's sample over the guided teacher's; detached scalars.
    """
    return {
        "score_gap_abs_mean": (scores.critic_x0 - scores.teacher_x0).abs().mean(),
        "x0_std_ratio": student_x0.detach().std() / scores.teacher_x0.std(),
    }


def critic_step(networks: Networks, batch: Batch, draws: StepDraws, config: DistillConfig) -> StepResult:
    """Compute the critic's flow-matching loss on a fresh student sample.

    Args:
        networks: the critic gets the gradient; the student is only sampled.
        batch: prompts.
        draws: random numbers, not those of a student step.
        config: the run's settings.

    Returns:
        Loss, no further metrics.
    """
    denoise = denoiser(networks.student, networks.precision)
    student_x0 = student_sample(denoise, batch, draws, config.grid(), config.sampler, with_grad=False)
    return critic_result(networks, batch, student_x0, draws)


def critic_result(networks: Networks, batch: Batch, student_x0: Tensor, draws: StepDraws) -> StepResult:
    """Compute the loss of `critic_step` on a sample that is there."""
    latents = add_noise(student_x0, draws.score_noise, draws.score_sigma)
    flow_pred = denoiser(networks.critic, networks.precision)(latents, draws.score_timestep, batch.prompt_embeds)
    return StepResult(loss=flow_loss(flow_pred, student_x0, draws.score_noise), metrics={})
