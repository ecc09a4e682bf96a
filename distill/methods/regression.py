"""Regression: the student predicts, from states of the teacher's own paths at its levels, where the paths end.

The start of a matching run (`start.updates`), and a method of its own. Owns its settings, draws and loss; the
denoising steps are those of matching.py.

Legend: B batch, K levels of the student, C channels, F latent frames, H and W latent rows and columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from codmd_serve.grid import StepGrid
from codmd_serve.schedule import flow_to_x0
from distill.config import DistillConfig, MethodSettings, Recipe
from distill.data.prompts import Batch
from distill.data.teacher_latents import TeacherSampling
from distill.losses.regression import regression_loss
from distill.methods import matching
from distill.methods.draws import Passes, StepResult, Turn
from distill.networks.build import Networks, denoiser
from distill.settings import StartConfig, ValidateConfig, check_range
from distill.streams import named_rng

NAME = "regression"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig(MethodSettings):
    """Settings of regression.

    Attributes:
        paths: of the teacher that are stored and trained on.
        teacher_steps: Euler steps of a path; it also steps on the student's levels.
        shift: of the teacher's steps.
        sigmas: levels of the student, descending; where empty, those of `shifted_grid`.
    """

    group: ClassVar[str] = "regression"

    paths: int = 4096
    teacher_steps: int = 50
    shift: float = 3.0
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_range("regression.paths", self.paths, 1, 10**9)
        check_range("regression.teacher_steps", self.teacher_steps, 1, 10_000)
        check_range("regression.shift", self.shift, 1e-3, 1e3)

    def check(self, config: DistillConfig) -> None:
        """Accept every config."""
        del config

    def step_grid(self, config: DistillConfig) -> StepGrid:
        """Return the steps at `sigmas`, fed config.timesteps where these are given; or `shifted_grid`."""
        grid = matching.shifted_grid(config)
        return StepGrid(sigmas=(*self.sigmas, 0.0), timesteps=grid.timesteps) if self.sigmas else grid


def regression_settings(config: DistillConfig) -> RegressionConfig:
    """Return the settings of a config of regression."""
    assert isinstance(config.method_settings, RegressionConfig)
    return config.method_settings


def start_of(config: DistillConfig) -> DistillConfig | None:
    """Return the run of regression that comes before a run, or None where it starts from the base or a file.

    Its student takes the same steps on the same prompts; of the optimizer, only the learning rate is its own.
    """
    start = config.start
    if start.updates == 0:
        return None
    grid = config.grid()
    return replace(
        config,
        method=NAME,
        method_settings=RegressionConfig(
            paths=start.paths, teacher_steps=start.teacher_steps, shift=start.shift, sigmas=grid.sigmas[:-1]
        ),
        timesteps=grid.timesteps,
        optimizer=replace(config.optimizer, student_lr=start.student_lr),
        max_iterations=start.updates,
        start=StartConfig(),
        validate=ValidateConfig(),
        bundle_dtype="fp32",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionDraws:
    """The random numbers of one turn: levels (B,) int64, at which level of the student each sample is trained."""

    levels: Tensor


def regression_step(networks: Networks, batch: Batch, draws: RegressionDraws, config: DistillConfig) -> StepResult:
    """Compute the regression loss at one level of each sample's path.

    Args:
        networks: the student gets the gradient.
        batch: prompts, x0 and states.
        draws: random numbers.
        config: the run's settings.

    Returns:
        Loss, no further metrics.
    """
    assert batch.x0 is not None and batch.states is not None
    grid, device = config.grid(), batch.x0.device
    latents = batch.states[torch.arange(len(batch.states), device=device), draws.levels]
    sigma_B = torch.tensor(grid.sigmas[:-1], device=device)[draws.levels]
    timestep_B = torch.tensor(grid.timesteps, dtype=torch.float32, device=device)[draws.levels]
    flow_pred = denoiser(networks.student, networks.precision)(latents, timestep_B, batch.prompt_embeds)
    return StepResult(loss=regression_loss(flow_to_x0(latents, flow_pred, sigma_B), batch.x0), metrics={})


@final
@dataclass(frozen=True, slots=True)
class RegressionMethod:
    """Regression as a `registry.Method`."""

    name: str = NAME
    settings: type[MethodSettings] = RegressionConfig

    def configure(self, recipe: Recipe) -> DistillConfig:
        """Return the settings of codmd for a recipe, with those of regression in the place of its relational term.

        The learning rate is ours: regression knows no critic that a fast student would outrun.
        """
        config = matching.configure(recipe)
        optimizer = replace(config.optimizer, student_lr=StartConfig().student_lr)
        return replace(config, method=self.name, method_settings=RegressionConfig(), optimizer=optimizer)

    def turns(self, config: DistillConfig, iteration: int) -> tuple[str, ...]:
        """Return the student alone: there is nothing for a critic to learn."""
        del config, iteration
        return ("student",)

    def draw(
        self,
        config: DistillConfig,
        role: str,
        iteration: int,
        shape: tuple[int, ...],
        device: torch.device,
        positions: range | None = None,
    ) -> RegressionDraws:
        """Draw the level of each place of the batch, uniformly."""
        rng = named_rng(config.seed, role, iteration)
        level_B = torch.randint(len(config.grid().timesteps), (shape[0],), generator=rng)
        own = level_B if positions is None else level_B[positions.start : positions.stop]
        return RegressionDraws(levels=own.to(device))

    def losses(self, turn: Turn) -> Iterator[StepResult]:
        """Yield the loss of each micro-batch of a turn."""
        for positions in turn.micro_batches():
            draws = self.draw(turn.config, turn.role, turn.iteration, turn.shape, turn.device, positions)
            yield regression_step(turn.networks, turn.load(positions), draws, turn.config)

    def passes(self, config: DistillConfig) -> dict[str, Passes]:
        """Count one forward and backward of the student; the critic has no turn."""
        del config
        return {"student": Passes(turns=1.0), "critic": Passes(turns=0.0, trained=0.0)}

    def notes(self, config: DistillConfig) -> tuple[str, ...]:
        """Say nothing beside what is counted."""
        del config
        return ()

    def authors_samples(self, config: DistillConfig) -> int | None:
        """Return None: no plan of the authors' layout."""
        del config
        return None

    def teacher_sampling(self, config: DistillConfig) -> TeacherSampling:
        """Return the teacher's paths, kept at the levels of the student."""
        settings = regression_settings(config)
        return TeacherSampling(
            num_steps=settings.teacher_steps,
            shift=settings.shift,
            kept_sigmas=config.grid().sigmas[:-1],
            num_samples=settings.paths,
        )
