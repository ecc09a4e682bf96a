"""DP-DMD: the first step of the rollout follows the teacher, the later ones match its distribution.

Owns its settings, published constants, denoising steps, turns, draws and the student's loss; the critic's loss is that
of scores.py. Every random number comes in through `StepDraws`.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, L prompt positions, D text width.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.grid import StepGrid
from codmd_serve.sampler import Denoise
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, shift_sigma
from distill.config import ANALYTIC_RECIPES, DistillConfig, MethodSettings, OptimizerConfig, Recipe
from distill.data.prompts import Batch
from distill.data.teacher_latents import TeacherSampling
from distill.losses.dmd import dmd_loss
from distill.losses.trajectory import trajectory_loss
from distill.methods import matching
from distill.methods.draws import Passes, StepDraws, StepResult, Turn, draw_exits, draw_step, steps_before_exit
from distill.methods.matching import shifted_grid
from distill.methods.scores import critic_step, score_metrics, score_sample, student_sample
from distill.networks.build import Networks, denoiser, guided_teacher_flow
from distill.settings import check_choice, check_range
from distill.streams import named_rng

FULL, EXIT = "full", "exit"
# What the authors publish, on every teacher; of small worlds these settings stay the recipe's.
AUTHORS_OPTIMIZER = OptimizerConfig(
    student_lr=1e-5, critic_lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0, clip_norm=1.0
)
SMALL_WORLDS = ("shapeworld", *ANALYTIC_RECIPES)
# Lowest and highest level of their 1000: shift 3 of shift 3 of .001, since diffusers shifts the ends of a schedule
# before it shifts the whole.
AUTHORS_SCORE_SIGMAS = (0.00893, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DpDmdConfig(MethodSettings):
    """Settings of dp-dmd: the student's first flow leads to where the teacher is after some of its steps.

    Attributes:
        weight: of the diversity term.
        teacher_steps: Euler steps of the teacher from noise to data.
        match_step: after how many of them the student meets it.
        shift: of the teacher's steps.
        matching: "full" as the authors have it: all steps after the first are matched through the end of the rollout,
            an iteration trains either critic or student, and the direction is divided by the teacher's distance from
            the noisy state. "exit", as LightX2V-train has it: the rollout stops at a drawn step after the first, turns
            and normaliser are those of dmd.
    """

    group: ClassVar[str] = "dp_dmd"
    has_exit_steps: ClassVar[bool] = True

    weight: float = 0.05
    teacher_steps: int = 30
    match_step: int = 10
    shift: float = 3.0
    matching: str = FULL

    @classmethod
    def upgraded(cls, saved: Mapping[str, Any], saved_format: int) -> dict[str, Any]:
        """Return settings of an older format; up to format 3 dp-dmd was what "exit" is now."""
        return {"matching": EXIT, **saved} if saved_format <= 3 else dict(saved)

    def __post_init__(self) -> None:
        check_choice("dp_dmd.matching", self.matching, (FULL, EXIT))
        check_range("dp_dmd.weight", self.weight, 0.0, 1e4)
        check_range("dp_dmd.teacher_steps", self.teacher_steps, 1, 10_000)
        check_range("dp_dmd.match_step", self.match_step, 1, self.teacher_steps)
        check_range("dp_dmd.shift", self.shift, 1e-3, 1e3)

    def check(self, config: DistillConfig) -> None:
        """Refuse a student of one step and settings that have no meaning.

        Raises:
            ConfigError: names the key.
        """
        if self.matching == FULL:
            self._check_full(config)
        if len(config.grid().timesteps) < 2:
            raise ConfigError(
                f"timesteps or step_levels must be 2 or more for method {config.method}: the first is not matched"
            )

    def _check_full(self, config: DistillConfig) -> None:
        told = {
            "sampler": (config.sampler, "ode", "fresh noise after the first step undoes what that step chose"),
            "score_window": (config.score_window, "full", "only the end of the rollout is scored"),
            "exit_per_sample": (config.exit_per_sample, False, "every rollout runs to its end"),
        }
        for key, (got, wanted, reason) in told.items():
            if got != wanted:
                raise ConfigError(
                    f"{key} must be {json.dumps(wanted)} for dp_dmd.matching full, got {json.dumps(got)}: {reason}"
                )
        if config.student_every_iterations < 2:
            raise ConfigError(
                "student_every_iterations must be 2 or more for dp_dmd.matching full, got "
                f"{config.student_every_iterations}: an iteration trains either critic or student, so the critic would "
                "never be trained"
            )

    def step_grid(self, config: DistillConfig) -> StepGrid:
        """Return `shifted_grid`."""
        return shifted_grid(config)


def dp_dmd_settings(config: DistillConfig) -> DpDmdConfig:
    """Return the settings of a config of dp-dmd."""
    assert isinstance(config.method_settings, DpDmdConfig)
    return config.method_settings


def dp_dmd_turns(config: DistillConfig, iteration: int) -> tuple[str, ...]:
    """Return the role of an iteration: N - 1 turns of the critic, then one of the student; or `matching_turns`.

    Source: dpdmd@d8f75c9 train_sd35_dpdmd.py: train_student = (iteration + 1) % (per_train_fake_num + 1) == 0.
    """
    if dp_dmd_settings(config).matching == EXIT:
        return matching.matching_turns(config, iteration)
    due = iteration - config.critic_warmup_iterations
    return ("student",) if due >= 0 and (due + 1) % config.student_every_iterations == 0 else ("critic",)


def draw_dp_dmd(
    config: DistillConfig,
    role: str,
    iteration: int,
    shape: tuple[int, ...],
    device: torch.device,
    positions: range | None = None,
) -> StepDraws:
    """Draw one turn: of a rollout to its end, or to an exit step that student and critic of an iteration share.

    An exit step is never the first: that step is not matched, and the critic learns what is matched.
    """
    rng = named_rng(config.seed, role, iteration)
    if dp_dmd_settings(config).matching == FULL:
        return draw_step(config, rng, shape, len(config.grid().timesteps) - 1, device, positions)
    exit_step, exit_steps = draw_exits(config, named_rng(config.seed, "exit", iteration), shape[0], first=1)
    return draw_step(config, rng, shape, exit_step, device, positions, exit_steps=exit_steps)


def dp_dmd_student_step(networks: Networks, batch: Batch, draws: StepDraws, config: DistillConfig) -> StepResult:
    """Compute distribution matching on the steps after the first plus the diversity term on the first.

    Args:
        networks: the student gets the gradient; teacher and critic are only evaluated.
        batch: prompts.
        draws: random numbers; exit steps are 1 or more, so that the first step is never matched.
        config: the run's settings.

    Returns:
        Loss L_dmd + dp_dmd.weight * L_trajectory and metrics loss_dmd, loss_trajectory and those of `score_metrics`.

    Source: DP-DMD, dpdmd@d8f75c9 train_sd35_dpdmd.py: matching collapses the mode that the first step has to choose, so
    that step gets the teacher's choice as its only target. Deviations: a score level per sample where theirs is one per
    GPU; see docs/explanation/constants.md.
    """
    is_full = dp_dmd_settings(config).matching == FULL
    rolled_out = full_rollout if is_full else exit_rollout
    first_flow, student_x0 = rolled_out(denoiser(networks.student, networks.precision), batch, draws, config)
    scores = score_sample(networks, batch, student_x0, draws, config, is_relative_to_state=is_full)
    loss_dmd = dmd_loss(student_x0, scores.direction)
    start = config.grid().sigmas[0] * draws.rollout_noise[0]
    levels = teacher_levels(config)
    teacher_state = early_trajectory(networks, batch, start, levels, config.guidance_scale)
    loss_trajectory = trajectory_loss(first_flow, start, teacher_state, levels[0], levels[-1])
    metrics = {
        "loss_dmd": loss_dmd.detach(),
        "loss_trajectory": loss_trajectory.detach(),
        **score_metrics(student_x0, scores),
    }
    return StepResult(loss=loss_dmd + dp_dmd_settings(config).weight * loss_trajectory, metrics=metrics)


def full_rollout(denoise: Denoise, batch: Batch, draws: StepDraws, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """Take all Euler steps with gradient; between the first and the second the state is a constant.

    Returns:
        The flow of the first step and the end of the rollout, (B, C, F, H, W), both with gradient, the end not to the
        first step.
    """
    grid = config.grid()
    latents = grid.sigmas[0] * draws.rollout_noise[0]
    flows: list[Tensor] = []
    for (sigma, lower_sigma), timestep in zip(pairwise(grid.sigmas), grid.timesteps, strict=True):
        timestep_B = torch.full((latents.shape[0],), timestep, device=latents.device)
        flows.append(denoise(latents, timestep_B, batch.prompt_embeds))
        flow = flows[-1] if len(flows) > 1 else flows[0].detach()
        latents = latents + (lower_sigma - sigma) * flow.to(latents.dtype)
    return flows[0], latents


def exit_rollout(denoise: Denoise, batch: Batch, draws: StepDraws, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """Roll out to the exit step; the first step and the exit step carry gradient.

    Returns:
        The flow of the first step and x0_pred of the exit step, (B, C, F, H, W), both with gradient.
    """
    first: list[Tensor] = []

    def keep_first_graph(latents: Tensor, timestep_B: Tensor, prompt_embeds_BLD: Tensor) -> Tensor:
        # The rollout runs early steps without gradient. The first has a loss of its own, and one forward serves both.
        if first:
            return denoise(latents, timestep_B, prompt_embeds_BLD)
        with torch.enable_grad():
            first.append(denoise(latents, timestep_B, prompt_embeds_BLD))
        return first[0].detach()

    student_x0 = student_sample(keep_first_graph, batch, draws, config.grid(), config.sampler, with_grad=True)
    return first[0], student_x0


def teacher_levels(config: DistillConfig) -> tuple[float, ...]:
    """Return the dp_dmd.match_step + 1 noise levels of the teacher's first steps, from the student's first level."""
    settings, start = dp_dmd_settings(config), config.grid().sigmas[0]
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


@final
@dataclass(frozen=True, slots=True)
class TrajectoryMethod:
    """dp-dmd as a `registry.Method`."""

    name: str = "dp-dmd"
    settings: type[MethodSettings] = DpDmdConfig

    def configure(self, recipe: Recipe) -> DistillConfig:
        """Return the authors' settings on a recipe's teacher.

        Of the recipe are the student's steps, guidance, the shift of the scores, batch, average and, for small
        worlds, the optimizer. It says how many turns of the critic a student's turn has, 5 as the authors' for Wan, and
        the iterations are as many as give both roles the updates that they have by codmd.

        Source: dpdmd@d8f75c9 scripts/run_train_sd35.sh, train_sd35_dpdmd.py (Stable Diffusion 3.5 medium, images).
        """
        config = matching.configure(recipe)
        critic_turns = config.student_every_iterations
        return replace(
            config,
            method=self.name,
            method_settings=DpDmdConfig(),
            optimizer=config.optimizer if recipe.name in SMALL_WORLDS else AUTHORS_OPTIMIZER,
            student_every_iterations=critic_turns + 1,
            max_iterations=config.max_iterations // critic_turns * (critic_turns + 1),
            sampler="ode",
            score_window="full",
            score_sigma_min=AUTHORS_SCORE_SIGMAS[0],
            score_sigma_max=AUTHORS_SCORE_SIGMAS[1],
        )

    def turns(self, config: DistillConfig, iteration: int) -> tuple[str, ...]:
        """Return `dp_dmd_turns`."""
        return dp_dmd_turns(config, iteration)

    def draw(
        self,
        config: DistillConfig,
        role: str,
        iteration: int,
        shape: tuple[int, ...],
        device: torch.device,
        positions: range | None = None,
    ) -> StepDraws:
        """Return `draw_dp_dmd`."""
        return draw_dp_dmd(config, role, iteration, shape, device, positions)

    def losses(self, turn: Turn) -> Iterator[StepResult]:
        """Yield the loss of each micro-batch of a turn."""
        step = dp_dmd_student_step if turn.role == "student" else critic_step
        for positions in turn.micro_batches():
            draws = self.draw(turn.config, turn.role, turn.iteration, turn.shape, turn.device, positions)
            yield step(turn.networks, turn.load(positions), draws, turn.config)

    def passes(self, config: DistillConfig) -> dict[str, Passes]:
        """Count the passes of each role's turn; an exit step is uniform over all but the first."""
        settings, num_steps = dp_dmd_settings(config), len(config.grid().timesteps)
        teacher = 1.0 + settings.match_step
        if settings.matching == FULL:
            due = max(config.max_iterations - config.critic_warmup_iterations, 0)
            share = due // config.student_every_iterations / config.max_iterations
            return {
                "student": Passes(turns=share, critic=1.0, teacher=teacher, trained=float(num_steps), graphs=num_steps),
                "critic": Passes(turns=1.0 - share, student=float(num_steps)),
            }
        before_exit = steps_before_exit(config, first=1)
        return {
            # The first step and the exit step both carry gradient.
            "student": Passes(
                turns=matching.student_turns(config),
                student=before_exit - 1,
                critic=1.0,
                teacher=teacher,
                trained=2.0,
                graphs=2,
            ),
            "critic": Passes(turns=1.0, student=before_exit + 1),
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
        """Return None: the student is trained on prompts alone."""
        del config
        return None
