"""DP-DMD: the first step of the rollout follows the teacher, the later ones match its distribution.

Owns its settings, denoising steps, draws and the student's loss; turns, draws' law and the critic's loss are those of
matching.py. Every random number comes in through `StepDraws`.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, L prompt positions, D text width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.grid import StepGrid
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, shift_sigma
from distill.config import DistillConfig, MethodSettings, Recipe
from distill.data.prompts import Batch
from distill.data.teacher_latents import TeacherSampling
from distill.losses.dmd import dmd_loss
from distill.losses.trajectory import trajectory_loss
from distill.methods import matching
from distill.methods.draws import Passes, StepDraws, StepResult, Turn, draw_exit_step, draw_step
from distill.methods.matching import shifted_grid
from distill.methods.scores import critic_step, score_metrics, score_sample, student_sample
from distill.networks.build import Networks, denoiser, guided_teacher_flow
from distill.settings import check_range
from distill.streams import named_rng


@dataclass(frozen=True, kw_only=True, slots=True)
class DpDmdConfig(MethodSettings):
    """Settings of dp-dmd: the student's first flow leads to where the teacher is after some of its steps.

    Attributes:
        weight: of the diversity term.
        teacher_steps: Euler steps of the teacher from noise to data.
        match_step: after how many of them the student meets it.
        shift: of the teacher's steps.
    """

    group: ClassVar[str] = "dp_dmd"

    weight: float = 0.05
    teacher_steps: int = 30
    match_step: int = 10
    shift: float = 3.0

    def __post_init__(self) -> None:
        check_range("dp_dmd.weight", self.weight, 0.0, 1e4)
        check_range("dp_dmd.teacher_steps", self.teacher_steps, 1, 10_000)
        check_range("dp_dmd.match_step", self.match_step, 1, self.teacher_steps)
        check_range("dp_dmd.shift", self.shift, 1e-3, 1e3)

    def check(self, config: DistillConfig) -> None:
        """Refuse a student of one step.

        Raises:
            ConfigError: names the key.
        """
        if len(config.grid().timesteps) < 2:
            raise ConfigError(
                f"timesteps or step_levels must be 2 or more for method {config.method}: the first is not matched"
            )

    def step_grid(self, config: DistillConfig) -> StepGrid:
        """Return `shifted_grid`."""
        return shifted_grid(config)


def dp_dmd_settings(config: DistillConfig) -> DpDmdConfig:
    """Return the settings of a config of dp-dmd."""
    assert isinstance(config.method_settings, DpDmdConfig)
    return config.method_settings


def draw_dp_dmd(
    config: DistillConfig,
    role: str,
    iteration: int,
    shape: tuple[int, ...],
    device: torch.device,
    positions: range | None = None,
) -> StepDraws:
    """Draw one turn; student and critic of an iteration stop at the same exit step, never at the first.

    The first step is not matched, and the critic learns what is matched.
    """
    exit_step = draw_exit_step(named_rng(config.seed, "exit", iteration), len(config.grid().timesteps), first=1)
    return draw_step(config, named_rng(config.seed, role, iteration), shape, exit_step, device, positions)


def dp_dmd_student_step(networks: Networks, batch: Batch, draws: StepDraws, config: DistillConfig) -> StepResult:
    """Compute distribution matching at an exit step after the first plus the diversity term on the first.

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
        # The rollout runs early steps without gradient. The first has a loss of its own, and one forward serves both.
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
    return StepResult(loss=loss_dmd + dp_dmd_settings(config).weight * loss_trajectory, metrics=metrics)


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
        """Return the settings of codmd for a recipe, with those of dp-dmd in the place of its relational term."""
        return replace(matching.configure(recipe), method=self.name, method_settings=DpDmdConfig())

    def turns(self, config: DistillConfig, iteration: int) -> tuple[str, ...]:
        """Return `matching_turns`."""
        return matching.matching_turns(config, iteration)

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
        """Count the passes of each role's turn: the exit step is uniform over all but the first."""
        mean_exit = len(config.grid().timesteps) / 2
        return {
            # The first step and the exit step both carry gradient.
            "student": Passes(
                turns=matching.student_turns(config),
                student=mean_exit - 1,
                critic=1.0,
                teacher=1.0 + dp_dmd_settings(config).match_step,
                trained=2.0,
                graphs=2,
            ),
            "critic": Passes(turns=1.0, student=mean_exit + 1),
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
