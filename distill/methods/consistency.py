"""Consistency methods: rcm, whose tangent is a forward-mode derivative, and dcm, whose tangent is a difference.

Both add distribution matching on rollouts. Owns their settings, published constants, denoising steps, turns, draws and
losses. Every random number comes in through `RcmDraws` or `RolloutDraws`.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.grid import StepGrid
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, add_noise, shift_sigma
from distill.config import ANALYTIC_RECIPES, DistillConfig, MethodSettings, Recipe
from distill.data.prompts import Batch
from distill.data.teacher_latents import TeacherSampling
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
from distill.methods import matching
from distill.methods.draws import Passes, StepDraws, StepResult, Turn, draw_step
from distill.methods.scores import score_metrics, score_sample, student_sample
from distill.networks.build import Networks, denoiser, guided_teacher_flow
from distill.settings import check_range
from distill.streams import named_rng, sample_noise

RCM, DCM = "rcm", "dcm"
# (latents_BCFHW, timestep_B) -> flow_BCFHW, prompts already filled in
Flow = Callable[[Tensor, Tensor], Tensor]
# Elements of the latents that the published weights belong to: 832 x 480 pixels, 81 frames.
REFERENCE_ELEMENTS = 2.0e6


@dataclass(frozen=True, kw_only=True, slots=True)
class RcmConfig(MethodSettings):
    """Settings of rcm and dcm: a consistency term on samples of the teacher, and distribution matching.

    The consistency term weighs scm_weight * sqrt(N / 2.0e6) for latents of N elements, which at Wan's size is the
    published 100: its gradient does not grow with N, that of the summed matching term grows with sqrt(N).

    Attributes:
        scm_weight: of the consistency term.
        dmd_weight: of distribution matching; 0 is a plain consistency model without critic.
        theta_mean, theta_std: log tan(theta) of the consistency term is N(mean, std^2). Published .7 is
            -.8 + .5 * log(21 frames).
        warmup_iterations: first iterations, with the consistency term alone; the tangent of rcm grows from 0 to 1.
        discrete_steps: dcm: parts into which the quarter turn from clean to noise is cut.
        sigma_max, sample_thetas: the student's denoising steps, where `timesteps` is empty: atan(sigma_max), then
            sample_thetas.
        data_steps, data_shift: Euler steps of the teacher behind each training sample, and their shift.
    """

    group: ClassVar[str] = "rcm"

    scm_weight: float = 100.0
    dmd_weight: float = 1.0
    theta_mean: float = 0.7
    theta_std: float = 1.6
    warmup_iterations: int = 0
    discrete_steps: int = 48
    sigma_max: float = 80.0
    sample_thetas: tuple[float, ...] = (1.5, 1.4, 1.0)
    data_steps: int = 50
    data_shift: float = 3.0

    def __post_init__(self) -> None:
        check_range("rcm.scm_weight", self.scm_weight, 1e-6, 1e6)
        check_range("rcm.dmd_weight", self.dmd_weight, 0.0, 1e6)
        check_range("rcm.theta_mean", self.theta_mean, -10.0, 10.0)
        check_range("rcm.theta_std", self.theta_std, 0.0, 10.0)
        check_range("rcm.warmup_iterations", self.warmup_iterations, 0, 10**9)
        check_range("rcm.discrete_steps", self.discrete_steps, 2, 10**6)
        check_range("rcm.sigma_max", self.sigma_max, 1e-3, 1e6)
        thetas = (math.atan(self.sigma_max), *self.sample_thetas)
        if not all(high > low for high, low in pairwise((*thetas, 0.0))):
            raise ConfigError(
                "rcm.sample_thetas must descend from below atan(rcm.sigma_max) to above 0, "
                f"got {list(self.sample_thetas)} under {thetas[0]:.6g}"
            )
        check_range("rcm.data_steps", self.data_steps, 1, 10_000)
        check_range("rcm.data_shift", self.data_shift, 1e-3, 1e3)

    def check(self, config: DistillConfig) -> None:
        """Refuse settings that have no meaning or leave a network untrained.

        Raises:
            ConfigError: names the key.
        """
        method = config.method
        if method == RCM and config.context_parallel > 1:
            raise ConfigError(
                f"context_parallel must be 1 for method {RCM}, got {config.context_parallel}: attention over split "
                "tokens has no forward-mode derivative"
            )
        if config.score_window != "full":
            raise ConfigError(
                f"score_window must be full for method {method}, got {config.score_window!r}: "
                "its rollouts stop at random levels, not at the steps that the windows lie between"
            )
        if self.dmd_weight > 0 and config.student_every_iterations < 2:
            raise ConfigError(
                f"student_every_iterations must be 2 or more for method {method}, "
                f"got {config.student_every_iterations}: an iteration trains either student or critic, so the critic "
                "would never be trained"
            )

    def step_grid(self, config: DistillConfig) -> StepGrid:
        """Return the steps at config.timesteps or, where that is empty, at sigma = tan(theta) / (1 + tan(theta))."""
        ratios = (self.sigma_max, *(math.tan(theta) for theta in self.sample_thetas))
        levels = (ratio / (1.0 + ratio) for ratio in ratios)
        timesteps = config.timesteps or tuple(NUM_TRAIN_TIMESTEPS * level for level in levels)
        sigmas = tuple(timestep / NUM_TRAIN_TIMESTEPS for timestep in timesteps)
        return StepGrid(sigmas=(*sigmas, 0.0), timesteps=tuple(timesteps))

    def float32_roles(self, config: DistillConfig) -> frozenset[str]:
        """Return the student of rcm: its derivative is taken in float32."""
        return frozenset({"student"}) if config.method == RCM else frozenset()


def rcm_settings(config: DistillConfig) -> RcmConfig:
    """Return the settings of a config of rcm or dcm."""
    assert isinstance(config.method_settings, RcmConfig)
    return config.method_settings


# By recipe: what is published beside the settings of `configure`.
_PUBLISHED: dict[str, dict[str, Any]] = {
    # -.8 + .5 * log(latent frames): 8 in the analytic worlds. The warm-up has about the published share of the run.
    "shapeworld": {"method_settings": RcmConfig(theta_mean=0.0, warmup_iterations=400, data_steps=25)},
    **{name: {"method_settings": RcmConfig(theta_mean=0.24, warmup_iterations=200)} for name in ANALYTIC_RECIPES},
    "wan_1_3b": {
        "method_settings": RcmConfig(theta_mean=0.7, warmup_iterations=1000, data_steps=100),
        "guidance_scale": 5.0,
        "score_shift": 5.0,
        "batch_size": 256,
        "max_iterations": 10_000,
    },
    "wan_14b": {
        "method_settings": RcmConfig(theta_mean=1.5, warmup_iterations=0, data_steps=100),
        "guidance_scale": 5.0,
        "score_shift": 5.0,
        "batch_size": 64,
        "max_iterations": 10_000,
        "student_every_iterations": 10,
    },
}
_LEARNING_RATES = {"wan_1_3b": (2e-6, 4e-7), "wan_14b": (1e-6, 1e-7)}


def configure(recipe: Recipe, method: str) -> DistillConfig:
    """Return the settings of rcm or dcm for a recipe; what is not published for them is that of codmd.

    Source: rcm@5b41aa9 rcm/configs/experiments/rcm/wan2pt1_t2v.py, for 14B its angles and its warm-up of 0 together
    (the paper, arXiv 2510.08431, warms 200 iterations up); batch, iterations and the average's length are the paper's.
    Deviation: score_sigma_min is 1e-4, since at level 0 there is no noise to score. docs/explanation/constants.md.
    """
    config = matching.configure(recipe)
    student_lr, critic_lr = _LEARNING_RATES.get(recipe.name, (config.optimizer.student_lr, config.optimizer.critic_lr))
    return replace(
        config,
        method=method,
        timesteps=(),
        score_window="full",
        score_sigma_min=1e-4,
        score_sigma_max=1.0,
        optimizer=replace(
            config.optimizer, student_lr=student_lr, critic_lr=critic_lr, betas=(0.0, 0.999), clip_norm=None
        ),
        ema=replace(config.ema, kind="power", length=0.05, start_after_updates=0),
        **_PUBLISHED[recipe.name],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutDraws:
    """The random numbers of a student rollout and of the noise level at which the sample is scored.

    Attributes:
        grid: as many steps as the rollout has, at random levels.
        draws: its exit_step is the last step of `grid`.
    """

    grid: StepGrid
    draws: StepDraws


@dataclass(frozen=True, kw_only=True, slots=True)
class RcmDraws:
    """The random numbers of one student step of rcm or dcm, on the training device.

    Attributes:
        theta: (B,) angle of the consistency term.
        data_noise: (B, C, F, H, W) noise of its state.
        tangent_ratio: progress of its warm-up, 0..1.
        rollout: for distribution matching, None during the warm-up and where dmd_weight is 0.
    """

    theta: Tensor
    data_noise: Tensor
    tangent_ratio: float
    rollout: RolloutDraws | None


def rcm_turns(config: DistillConfig, iteration: int) -> tuple[str, ...]:
    """Return the role of an iteration: never both.

    During the warm-up of the consistency term it is the student. After it the student has every
    student_every_iterations-th iteration and the critic the others; the first critic_warmup_iterations of these are the
    critic's alone.
    """
    settings = rcm_settings(config)
    due = iteration - settings.warmup_iterations
    if due < 0 or settings.dmd_weight == 0:
        return ("student",)
    turn = due - config.critic_warmup_iterations
    return ("student",) if turn >= 0 and turn % config.student_every_iterations == 0 else ("critic",)


def draw_rcm(
    config: DistillConfig,
    role: str,
    iteration: int,
    shape: tuple[int, ...],
    device: torch.device,
    positions: range | None = None,
) -> RcmDraws | RolloutDraws:
    """Draw everything random in one step.

    Args:
        config: gives seed and laws.
        role: "student" or "critic".
        iteration: counted from 0.
        shape: (B, C, F, H, W) of the whole batch's latents.
        device: where the numbers go.
        positions: places of the batch to draw for; None is all of them.

    Returns:
        `RcmDraws` for the student, `RolloutDraws` for the critic.

    Source: rCM (arXiv 2510.08431): log tan(theta) is normal, rollouts take 1, 2, 3, 4, 1, ... steps in turn.
    """
    rng = named_rng(config.seed, role, iteration)
    # A stream of its own: all ranks need the same levels.
    level_rng = named_rng(config.seed, "levels", iteration)
    places = range(shape[0]) if positions is None else positions
    rollout_steps = rollout_length(config, role, iteration)
    if role == "critic":
        return _draw_rollout(config, rng, level_rng, rollout_steps, shape, device, places)
    settings = rcm_settings(config)
    log_ratio = settings.theta_mean + settings.theta_std * torch.randn(shape[0], generator=rng)
    data_noise = sample_noise(rng, shape[1:], places)
    rollout = None
    if _is_matched(settings, iteration):
        rollout = _draw_rollout(config, rng, level_rng, rollout_steps, shape, device, places)
    return RcmDraws(
        theta=log_ratio[places.start : places.stop].exp().atan().to(device),
        data_noise=data_noise.to(device),
        tangent_ratio=min(1.0, iteration / settings.warmup_iterations) if settings.warmup_iterations else 1.0,
        rollout=rollout,
    )


def _is_matched(settings: RcmConfig, iteration: int) -> bool:
    return iteration >= settings.warmup_iterations and settings.dmd_weight > 0


def rollout_length(config: DistillConfig, role: str, iteration: int) -> int:
    """Return the number of rollout steps of a turn: 1 to the number of steps of the student, over and over.

    It counts the role's own turns. Counted in iterations, student_every_iterations of 10 would only ever give the
    student lengths 1 and 3.
    """
    due = iteration - rcm_settings(config).warmup_iterations
    student_turns = max(math.ceil((due - config.critic_warmup_iterations) / config.student_every_iterations), 0)
    turn = student_turns if role == "student" else due - student_turns
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
    """Compute the consistency term on samples of the teacher and distribution matching on a student rollout.

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
    rollout are one sorted draw for the whole batch, where the published ones are running minima: the sampler wants
    descending levels, and the exit level has the same law. The root is for latents smaller than the published ones: see
    RcmConfig.
    """
    settings = rcm_settings(config)
    consistency, metrics = _consistency_term(networks, batch, draws, config)
    num_elements = draws.data_noise[0].numel()
    loss = settings.scm_weight * math.sqrt(num_elements / REFERENCE_ELEMENTS) * consistency
    if draws.rollout is not None:
        rollout = draws.rollout
        denoise = denoiser(networks.student, networks.precision)
        student_x0 = student_sample(denoise, batch, rollout.draws, rollout.grid, config.sampler, with_grad=True)
        scores = score_sample(networks, batch, student_x0, rollout.draws, config)
        # dmd_loss is half a mean over all elements; here it is a sum over those of a sample.
        summed = 2 * num_elements * dmd_loss(student_x0, scores.direction)
        loss = loss + settings.dmd_weight * summed
        metrics |= {"loss_dmd": summed.detach(), **score_metrics(student_x0, scores)}
    return StepResult(loss=loss, metrics=metrics)


def rcm_critic_step(networks: Networks, batch: Batch, draws: RolloutDraws, config: DistillConfig) -> StepResult:
    """Compute the critic's flow-matching loss on a fresh student rollout, weighted as TrigFlow does.

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
    if config.method == RCM:
        own, derivative = velocity_and_tangent(_student_velocity(networks, batch, "fp32"), x, theta, teacher_velocity)
        tangent = scm_tangent(x, own, teacher_velocity, derivative, theta, draws.tangent_ratio)
    else:
        lower_theta = (theta - 0.5 * math.pi / rcm_settings(config).discrete_steps).clamp_min(0.0)
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


@final
@dataclass(frozen=True, slots=True)
class ConsistencyMethod:
    """rcm or dcm as a `registry.Method`."""

    name: str
    settings: type[MethodSettings] = RcmConfig

    def configure(self, recipe: Recipe) -> DistillConfig:
        """Return `configure` of this method."""
        return configure(recipe, self.name)

    def turns(self, config: DistillConfig, iteration: int) -> tuple[str, ...]:
        """Return `rcm_turns`."""
        return rcm_turns(config, iteration)

    def draw(
        self,
        config: DistillConfig,
        role: str,
        iteration: int,
        shape: tuple[int, ...],
        device: torch.device,
        positions: range | None = None,
    ) -> RcmDraws | RolloutDraws:
        """Return `draw_rcm`."""
        return draw_rcm(config, role, iteration, shape, device, positions)

    def losses(self, turn: Turn) -> Iterator[StepResult]:
        """Yield the loss of each micro-batch of a turn."""
        for positions in turn.micro_batches():
            draws = self.draw(turn.config, turn.role, turn.iteration, turn.shape, turn.device, positions)
            batch = turn.load(positions)
            if isinstance(draws, RcmDraws):
                yield rcm_student_step(turn.networks, batch, draws, turn.config)
            else:
                yield rcm_critic_step(turn.networks, batch, draws, turn.config)

    def passes(self, config: DistillConfig) -> dict[str, Passes]:
        """Count the passes of each role's turn: rollouts take 1 to num_steps steps in turn."""
        settings, num_iterations = rcm_settings(config), config.max_iterations
        warmup = num_iterations if settings.dmd_weight == 0 else min(settings.warmup_iterations, num_iterations)
        due = max(num_iterations - warmup - config.critic_warmup_iterations, 0)
        matched = math.ceil(due / config.student_every_iterations)
        before_exit = (len(config.grid().timesteps) - 1) / 2
        share = matched / (warmup + matched) if warmup + matched else 0.0
        return {
            "student": Passes(
                turns=(warmup + matched) / num_iterations,
                # dcm also evaluates its student where one Euler step of the teacher leads.
                student=share * before_exit + (self.name == DCM),
                critic=share,
                teacher=1.0 + share,
                trained=1.0 + share,
                graphs=2 if matched else 1,
                derivatives=float(self.name == RCM),
            ),
            "critic": Passes(turns=(num_iterations - warmup - matched) / num_iterations, student=before_exit + 1),
        }

    def notes(self, config: DistillConfig) -> tuple[str, ...]:
        """Say nothing beside what is counted."""
        del config
        return ()

    def authors_samples(self, config: DistillConfig) -> int | None:
        """Return None: no plan of the authors' layout."""
        del config
        return None

    def teacher_sampling(self, config: DistillConfig) -> TeacherSampling | None:
        """Return how the samples of the teacher are made that the consistency term is trained on."""
        settings = rcm_settings(config)
        return TeacherSampling(num_steps=settings.data_steps, shift=settings.data_shift)
