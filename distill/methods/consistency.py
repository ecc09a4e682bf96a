"""Student and critic steps of rcm and dcm: consistency on samples of the teacher, distribution matching on rollouts.

Deterministic: every random number comes in through `RcmDraws` or `RolloutDraws`. Knows neither optimizers nor files.

Layout: B batch, C channels, F latent frames, H, W latent pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from codmd_serve.grid import StepGrid
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, add_noise, shift_sigma
from distill.config import DistillConfig
from distill.data.prompts import Batch
from distill.losses.consistency import (
    Velocity,
    consistency_loss,
    dcm_tangent,
    normalise_tangent,
    scm_tangent,
    teacher_step,
    trig_state,
    trig_to_rectified,
    trig_velocity,
    trig_x0,
    velocity_and_tangent,
    velocity_loss,
)
from distill.losses.dmd import dmd_loss
from distill.methods.matching import (
    StepDraws,
    StepResult,
    draw_step,
    sample_noise,
    score_metrics,
    score_sample,
    step_rng,
    student_sample,
)
from distill.networks.build import Networks, denoiser, guided_teacher_flow

# (latents_BCFHW, timestep_B) -> flow_BCFHW, prompts already filled in
Flow = Callable[[Tensor, Tensor], Tensor]
# Elements of the latents that the published weights belong to: 832 x 480 pixels, 81 frames.
REFERENCE_ELEMENTS = 2.0e6


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutDraws:
    """The random numbers of a student rollout and of the noise level at which the sample is looked at.

    grid has as many steps as the rollout, at random levels; draws.exit_step is its last step.
    """

    grid: StepGrid
    draws: StepDraws


@dataclass(frozen=True, kw_only=True, slots=True)
class RcmDraws:
    """The random numbers of one student step of rcm or dcm, on the training device.

    theta (B,) and data_noise (B, C, F, H, W) make the state of the consistency term; tangent_ratio in 0..1 is how far
    its warm-up has come; rollout is for distribution matching, None where that has no part in the step.
    """

    theta: Tensor
    data_noise: Tensor
    tangent_ratio: float
    rollout: RolloutDraws | None


def rcm_turns(config: DistillConfig, step: int) -> tuple[str, ...]:
    """Return who is trained in iteration `step`: the student alone while the consistency term warms up, then the
    student in every student_every_steps-th iteration and the critic in the others, never both.

    critic_warmup_steps iterations after the first warm-up are the critic's alone.
    """
    due = step - config.rcm.warmup_steps
    if due < 0 or config.rcm.dmd_weight == 0:
        return ("student",)
    turn = due - config.critic_warmup_steps
    return ("student",) if turn >= 0 and turn % config.student_every_steps == 0 else ("critic",)


def draw_rcm(
    config: DistillConfig,
    role: str,
    step: int,
    shape: tuple[int, ...],
    device: torch.device,
    positions: range | None = None,
) -> RcmDraws | RolloutDraws:
    """Draw everything random in one step.

    Args:
        config: gives seed and laws.
        role: "student" or "critic".
        step: iteration.
        shape: (B, C, F, H, W) of the whole batch's latents.
        device: where the numbers go.
        positions: places of the batch to draw for; None is all of them.

    Returns:
        `RcmDraws` for the student, `RolloutDraws` for the critic.

    Source: rCM (arXiv 2510.08431): log tan(theta) is normal, rollouts take 1, 2, 3, 4, 1, ... steps in turn.
    """
    rng = step_rng(config.seed, role, step)
    # An own stream: the levels are those of the whole batch, so they have to be equal on all ranks.
    level_rng = step_rng(config.seed, "levels", step)
    places = range(shape[0]) if positions is None else positions
    rollout_steps = rollout_length(config, role, step)
    if role == "critic":
        return _draw_rollout(config, rng, level_rng, rollout_steps, shape, device, places)
    settings = config.rcm
    log_ratio = settings.theta_mean + settings.theta_std * torch.randn(shape[0], generator=rng)
    data_noise = sample_noise(rng, shape[1:], places)
    rollout = None
    if step >= settings.warmup_steps and settings.dmd_weight > 0:
        rollout = _draw_rollout(config, rng, level_rng, rollout_steps, shape, device, places)
    return RcmDraws(
        theta=log_ratio[places.start : places.stop].exp().atan().to(device),
        data_noise=data_noise.to(device),
        tangent_ratio=min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0,
        rollout=rollout,
    )


def rollout_length(config: DistillConfig, role: str, step: int) -> int:
    """Return the number of rollout steps of a turn: 1 to the number of steps of the student, over and over.

    Counted in turns of the role itself; counted in iterations, student_every_steps of 10 would only ever give the
    student lengths 1 and 3.
    """
    due = step - config.rcm.warmup_steps - config.critic_warmup_steps
    student_turns = max(math.ceil(due / config.student_every_steps), 0)
    turn = student_turns if role == "student" else step - config.rcm.warmup_steps - student_turns
    return turn % len(config.grid().timesteps) + 1


def _draw_rollout(
    config: DistillConfig,
    rng: torch.Generator,
    level_rng: torch.Generator,
    num_steps: int,
    shape: tuple[int, ...],
    device: torch.device,
    positions: range,
) -> RolloutDraws:
    # float64: two equal levels in one grid, which no sampler accepts, are then out of the question.
    levels = torch.rand(num_steps - 1, generator=level_rng, dtype=torch.float64).sort(descending=True).values
    sigmas = (1.0, *(shift_sigma(level, config.score_shift) for level in levels.tolist()))
    grid = StepGrid(sigmas=(*sigmas, 0.0), timesteps=tuple(NUM_TRAIN_TIMESTEPS * sigma for sigma in sigmas))
    return RolloutDraws(grid=grid, draws=draw_step(config, rng, shape, num_steps - 1, device, positions))


def rcm_student_step(networks: Networks, batch: Batch, draws: RcmDraws, config: DistillConfig) -> StepResult:
    """Consistency term on samples of the teacher, and distribution matching on a rollout of the student.

    Args:
        networks: the student gets the gradient; teacher and critic are only evaluated.
        batch: prompts and, in x0, samples of the teacher for them.
        draws: random numbers.
        config: the run's settings.

    Returns:
        Loss rcm.scm_weight * sqrt(N / 2.0e6) * L_scm + rcm.dmd_weight * L_dmd, N elements of a sample, and metrics
        loss_scm, tangent_norm (of g before it is normalised, over the finite samples), tangent_masked (share of
        samples whose g is not finite and therefore left out), loss_dmd and those of `score_metrics`.

    Source: rCM (arXiv 2510.08431), L_scm of `consistency_loss` and L_dmd = sum((x0 - stopgrad(x0 - d))^2) with the
    direction d of `dmd_direction`, both sums over a sample and means over the batch. Deviations: the levels of a
    rollout are one sorted draw for the whole batch, where the published ones are running minima; the exit level has
    the same law, and the rollout is that of the sampler, which wants levels that descend. The root is for latents
    smaller than the published: see RcmConfig.
    """
    consistency, metrics = _consistency_term(networks, batch, draws, config)
    num_elements = draws.data_noise[0].numel()
    loss = config.rcm.scm_weight * math.sqrt(num_elements / REFERENCE_ELEMENTS) * consistency
    if draws.rollout is not None:
        rollout = draws.rollout
        denoise = denoiser(networks.student, networks.precision)
        student_x0 = student_sample(denoise, batch, rollout.draws, rollout.grid, config.sampler, with_grad=True)
        scores = score_sample(networks, batch, student_x0, rollout.draws, config)
        # dmd_loss is half a mean over all elements; here it is a sum over those of a sample.
        matching = 2 * num_elements * dmd_loss(student_x0, scores.direction)
        loss = loss + config.rcm.dmd_weight * matching
        metrics |= {"loss_dmd": matching.detach(), **score_metrics(student_x0, scores)}
    return StepResult(loss=loss, metrics=metrics)


def rcm_critic_step(networks: Networks, batch: Batch, draws: RolloutDraws, config: DistillConfig) -> StepResult:
    """Flow matching of the critic on a fresh student rollout, weighted as TrigFlow does.

    Args:
        networks: the critic gets the gradient; the student is only sampled.
        batch: prompts.
        draws: random numbers, not those of a student step.
        config: the run's settings.

    Returns:
        Loss of `velocity_loss`, no further metrics.
    """
    denoise = denoiser(networks.student, networks.precision)
    inner = draws.draws
    student_x0 = student_sample(denoise, batch, inner, draws.grid, config.sampler, with_grad=False)
    latents = add_noise(student_x0, inner.score_noise, inner.score_sigma)
    flow_pred = denoiser(networks.critic, networks.precision)(latents, inner.score_timestep, batch.prompt_embeds)
    return StepResult(loss=velocity_loss(flow_pred, student_x0, inner.score_noise, inner.score_sigma), metrics={})


def _consistency_term(
    networks: Networks, batch: Batch, draws: RcmDraws, config: DistillConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    assert batch.x0 is not None, "rcm and dcm are trained on samples of the teacher"
    theta = draws.theta
    x = trig_state(batch.x0, draws.data_noise, theta)
    with torch.no_grad():
        teacher_velocity = _velocity(_teacher_flow(networks, batch, config), x, theta)
    velocity = _student_velocity(networks, batch, networks.precision)(x, theta)
    if config.method == "rcm":
        own, derivative = velocity_and_tangent(_student_velocity(networks, batch, "fp32"), x, theta, teacher_velocity)
        tangent = scm_tangent(x, own, teacher_velocity, derivative, theta, draws.tangent_ratio)
    else:
        lower_theta = (theta - 0.5 * math.pi / config.rcm.discrete_steps).clamp_min(0.0)
        lower_x = teacher_step(x, teacher_velocity, theta, lower_theta)
        with torch.no_grad():
            lower_velocity = _student_velocity(networks, batch, networks.precision)(lower_x, lower_theta)
        lower_x0 = trig_x0(lower_x, lower_velocity, lower_theta)
        tangent = dcm_tangent(trig_x0(x, velocity.detach(), theta), lower_x0, theta, lower_theta)
    normalised, norm = normalise_tangent(tangent)
    loss = consistency_loss(velocity, normalised)
    is_finite = norm.isfinite()
    metrics = {
        "loss_scm": loss.detach(),
        "tangent_norm": norm.where(is_finite, 0.0).sum() / is_finite.sum().clamp_min(1),
        "tangent_masked": 1.0 - is_finite.float().mean(),
    }
    return loss, metrics


def _student_velocity(networks: Networks, batch: Batch, precision: str) -> Velocity:
    denoise = denoiser(networks.student, precision)

    def flow(latents: Tensor, timestep_B: Tensor) -> Tensor:
        return denoise(latents, timestep_B, batch.prompt_embeds)

    return partial(_velocity, flow)


def _teacher_flow(networks: Networks, batch: Batch, config: DistillConfig) -> Flow:
    denoise = denoiser(networks.teacher, networks.precision)
    negative_prompt_embeds, guidance_scale = batch.negative_prompt_embeds, config.guidance_scale

    def flow(latents: Tensor, timestep_B: Tensor) -> Tensor:
        return guided_teacher_flow(
            denoise, latents, timestep_B, batch.prompt_embeds, negative_prompt_embeds, guidance_scale
        )

    return flow


def _velocity(flow: Flow, x: Tensor, theta: Tensor) -> Tensor:
    latents, sigma = trig_to_rectified(x, theta)
    return trig_velocity(x, flow(latents, NUM_TRAIN_TIMESTEPS * sigma), theta)
