"""Distribution matching: codmd, with its relational (copula) term, and dmd, which is codmd without it.

Owns their settings, published constants, denoising steps, turns, draws and losses. Every random number comes in
through `MatchingDraws`.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, V videos, D features.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.grid import StepGrid
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, flow_to_x0, shift_sigma
from distill.config import (
    ANALYTIC_RECIPES,
    DistillConfig,
    EmaConfig,
    MethodSettings,
    OptimizerConfig,
    Recipe,
    StartConfig,
)
from distill.data.prompts import Batch
from distill.data.teacher_latents import TeacherSampling
from distill.losses.copula import FEATURES, copula_terms, pooled_features
from distill.losses.dmd import dmd_loss
from distill.methods.controls import (
    CONTROLS,
    MATCHED,
    NO_CONTROL,
    NOISE,
    ControlDraws,
    draw_control,
    replace_gradient,
)
from distill.methods.draws import (
    Passes,
    StepDraws,
    StepResult,
    Turn,
    draw_exits,
    draw_step,
    reference_sigma,
    steps_before_exit,
)
from distill.methods.exits import exit_levels
from distill.methods.relations import BatchRelations
from distill.methods.scores import Scores, critic_step, score_metrics, score_sample, student_sample
from distill.networks.build import Networks, denoiser
from distill.settings import check_choice, check_range
from distill.streams import named_rng

CODMD, DMD = "codmd", "dmd"
# Tensors that `ScoredSample` keeps: the exit step's input, the direction, teacher and critic x0.
KEPT_LATENTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class CopulaConfig(MethodSettings):
    """Settings of codmd and dmd. The relational term is scale * (weight_frame * frame + weight_batch * batch).

    Attributes:
        scale: of the whole term.
        weight_frame: of the relations between frames of a clip.
        weight_batch: of the relations between clips of a batch.
        temperature: of the softmax over similarities.
        features: "mean" over rows and columns, or "spatial", which sees motion that keeps channel means.
        grid: cells per side of "spatial".
        control: "none", or a control arm, whose term has lost its content: see `controls.py`.
        reference_compat: the authors' behaviour where ours departs from it.
    """

    group: ClassVar[str] = "copula"
    has_exit_steps: ClassVar[bool] = True

    scale: float = 0.1
    weight_frame: float = 1.0
    weight_batch: float = 0.0
    temperature: float = 0.1
    features: str = "mean"
    grid: int = 2
    control: str = NO_CONTROL
    reference_compat: bool = False

    def __post_init__(self) -> None:
        check_choice("copula.features", self.features, FEATURES)
        check_choice("copula.control", self.control, CONTROLS)
        check_range("copula.temperature", self.temperature, 1e-4, 10.0)
        check_range("copula.grid", self.grid, 1, 64)
        for name in ("scale", "weight_frame", "weight_batch"):
            check_range(f"copula.{name}", getattr(self, name), 0.0, 1e4)

    def check(self, config: DistillConfig) -> None:
        """Refuse a batch too small for the batch term.

        Raises:
            ConfigError: names the key.
        """
        smallest = 2 if self.reference_compat else 3
        if config.method == CODMD and self.weight_batch > 0 and config.batch_size < smallest:
            raise ConfigError(
                f"copula.weight_batch needs batch_size of {smallest} or more, got {config.batch_size}: "
                "fewer samples have no relations to compare"
            )

    def step_grid(self, config: DistillConfig) -> StepGrid:
        """Return `shifted_grid`, its sigmas snapped to the authors' table with `reference_compat`."""
        grid = shifted_grid(config)
        if not self.reference_compat:
            return grid
        sigmas = tuple(reference_sigma(timestep) for timestep in grid.timesteps)
        return StepGrid(sigmas=(*sigmas, 0.0), timesteps=grid.timesteps)


def shifted_grid(config: DistillConfig) -> StepGrid:
    """Return the denoising steps at config.timesteps or, where that is empty, at 1000 * shift(step_levels)."""
    levels = tuple(shift_sigma(level, config.step_shift) for level in config.step_levels)
    timesteps = config.timesteps or tuple(NUM_TRAIN_TIMESTEPS * level for level in levels)
    sigmas = tuple(timestep / NUM_TRAIN_TIMESTEPS for timestep in timesteps)
    return StepGrid(sigmas=(*sigmas, 0.0), timesteps=tuple(timesteps))


def copula_settings(config: DistillConfig) -> CopulaConfig:
    """Return the settings of a config of codmd or dmd."""
    assert isinstance(config.method_settings, CopulaConfig)
    return config.method_settings


# Self-Forcing's ema_start_step counts iterations, of which one in 5 updates the student.
# Source: guandeh17/Self-Forcing@33593df trainer/distillation.py (self.step), configs/self_forcing_dmd.yaml.
SELF_FORCING_EMA_START_ITERATIONS = 200
ITERATIONS_PER_STUDENT_UPDATE = 5

_WAN_1_3B: dict[str, Any] = {
    "optimizer": OptimizerConfig(student_lr=2e-6, critic_lr=4e-7),
    "ema": EmaConfig(
        decay=0.99, start_after_updates=SELF_FORCING_EMA_START_ITERATIONS // ITERATIONS_PER_STUDENT_UPDATE
    ),
    "batch_size": 64,
    "max_iterations": 3000,
    "student_every_iterations": ITERATIONS_PER_STUDENT_UPDATE,
    "guidance_scale": 4.5,
    "timesteps": (1000.0, 900.0, 757.0, 522.0),
    "score_shift": 8.0,
    "method_settings": CopulaConfig(),
}
# Chosen by hand on seed 0 of the world ties.
_ANALYTIC: dict[str, Any] = {
    "optimizer": OptimizerConfig(
        student_lr=5e-4, critic_lr=1e-3, betas=(0.0, 0.999), weight_decay=0.0, warmup_updates=50
    ),
    "ema": EmaConfig(decay=0.98),
    "batch_size": 64,
    "max_iterations": 2000,
    "student_every_iterations": 4,
    "guidance_scale": 1.0,
    "step_shift": 3.0,
    "score_shift": 3.0,
    "score_window": "step",
    "start": StartConfig(student_lr=1e-3),
    "method_settings": CopulaConfig(),
    "log_every_iterations": 100,
    "save_every_iterations": 1000,
}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "shapeworld": {
        "optimizer": OptimizerConfig(student_lr=1e-4, critic_lr=2e-4, betas=(0.0, 0.999)),
        "ema": EmaConfig(decay=0.97),
        "batch_size": 16,
        "max_iterations": 4000,
        "student_every_iterations": 4,
        "guidance_scale": 3.0,
        "step_shift": 3.0,
        "score_shift": 3.0,
        "score_window": "step",
        "method_settings": CopulaConfig(),
    },
    **dict.fromkeys(ANALYTIC_RECIPES, _ANALYTIC),
    "wan_1_3b": _WAN_1_3B,
    # Shift-5 steps and scores, both relational terms.
    "wan_14b": {
        **_WAN_1_3B,
        "optimizer": OptimizerConfig(student_lr=4e-6, critic_lr=8e-7),
        "batch_size": 32,
        "timesteps": (),
        "step_shift": 5.0,
        "score_shift": 5.0,
        "method_settings": CopulaConfig(weight_batch=1.0),
    },
}


def configure(recipe: Recipe, method: str = CODMD) -> DistillConfig:
    """Return the settings of codmd or dmd for a recipe: published ones for Wan, our own for shapeworld.

    Source: CoDMD@6a8259b configs; its 3.5 in cond + 3.5 * (cond - uncond) is guidance_scale 4.5. The batch of 64 is
    the repository's (the paper says 128); the moving average is Self-Forcing's, CoDMD has none.
    """
    return DistillConfig(method=method, **recipe.settings(), **_PUBLISHED[recipe.name])


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchingDraws(StepDraws):
    """`StepDraws` with what a control arm draws besides; `control` is empty outside of them."""

    control: ControlDraws = dataclasses.field(default_factory=ControlDraws)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSample:
    """A student sample with its scores, kept until its gradient is computed.

    Attributes:
        exit_latents: (B, C, F, H, W) input of the exit step, from which the sample is computed again with gradient.
        exit_sigma: noise level of that input, one number or (B,).
        exit_timestep: (B,) what the student is fed there.
        scores: of the sample.
        control: of `MatchingDraws`.
    """

    exit_latents: Tensor
    exit_sigma: float | Tensor
    exit_timestep: Tensor
    scores: Scores
    control: ControlDraws


def matching_turns(config: DistillConfig, iteration: int) -> tuple[str, ...]:
    """Return the roles of an iteration: the critic in each, the student before it in every N-th."""
    due = iteration - config.critic_warmup_iterations
    return ("student", "critic") if due >= 0 and due % config.student_every_iterations == 0 else ("critic",)


def student_turns(config: DistillConfig) -> float:
    """Return the student's turns per iteration of `matching_turns`, a mean over the run."""
    due = max(config.max_iterations - config.critic_warmup_iterations, 0)
    return math.ceil(due / config.student_every_iterations) / config.max_iterations


def draw_sample(
    config: DistillConfig,
    rng: torch.Generator,
    shape: tuple[int, ...],
    exit_step: int,
    device: torch.device,
    positions: range | None = None,
    exit_steps: Tensor | None = None,
) -> MatchingDraws:
    """Draw everything random in one step of codmd or dmd; arguments as `draw_step`."""
    settings = copula_settings(config)
    step = draw_step(
        config,
        rng,
        shape,
        exit_step,
        device,
        positions,
        exit_steps=exit_steps,
        reference_compat=settings.reference_compat,
    )
    shared = {entry.name: getattr(step, entry.name) for entry in dataclasses.fields(step)}
    # Last, so that control arms share every other draw.
    cells = 1 if settings.features == "mean" else settings.grid
    control = draw_control(settings.control, rng, shape, cells, device, positions)
    return MatchingDraws(**shared, control=control)


def student_step(
    networks: Networks,
    batch: Batch,
    draws: MatchingDraws,
    config: DistillConfig,
    relate: Callable[[Tensor], Tensor] | None = None,
) -> StepResult:
    """Compute the student's loss: distribution matching plus, for codmd, the relational term.

    Args:
        networks: the student gets the gradient; teacher and critic are only evaluated.
        batch: prompts.
        draws: random numbers.
        config: the run's settings.
        relate: where these samples are a part of the batch, gives features of the whole; see `copula_terms`.

    Returns:
        Loss and metrics loss_dmd, those of `score_metrics` and, for codmd, loss_frame and loss_batch.
    """
    denoise = denoiser(networks.student, networks.precision)
    student_x0 = student_sample(denoise, batch, draws, config.grid(), config.sampler, with_grad=True)
    scores = score_sample(networks, batch, student_x0, draws, config)
    return _student_loss(student_x0, scores, draws.control, config, relate)


@torch.no_grad()
def scored_sample(
    networks: Networks, batch: Batch, draws: MatchingDraws, config: DistillConfig
) -> tuple[ScoredSample, Tensor]:
    """Sample and score without gradient, as the first of two passes.

    Returns:
        What `resumed_student_step` needs, and the (B, 3, D) features of student, teacher and critic that relate these
        samples to the rest of the batch.
    """
    denoise, inputs = denoiser(networks.student, networks.precision), list[Tensor]()

    def note_input(latents: Tensor, timestep_B: Tensor, prompt_embeds_BLD: Tensor) -> Tensor:
        inputs[:] = [latents]
        return denoise(latents, timestep_B, prompt_embeds_BLD)

    student_x0 = student_sample(note_input, batch, draws, config.grid(), config.sampler, with_grad=False)
    scores = score_sample(networks, batch, student_x0, draws, config)
    settings = copula_settings(config)
    videos = (student_x0, scores.teacher_x0, scores.critic_x0)
    exit_sigma, exit_timestep = exit_levels(draws, config.grid(), len(student_x0), student_x0.device)
    sample = ScoredSample(
        exit_latents=inputs[0],
        exit_sigma=exit_sigma,
        exit_timestep=exit_timestep,
        scores=scores,
        control=draws.control,
    )
    return sample, pooled_features(videos, settings.features, settings.grid)


def resumed_student_step(
    networks: Networks,
    batch: Batch,
    sample: ScoredSample,
    config: DistillConfig,
    relate: Callable[[Tensor], Tensor],
) -> StepResult:
    """Compute the loss of `student_step` from `scored_sample`: one forward of the student, nothing scored again."""
    denoise, latents = denoiser(networks.student, networks.precision), sample.exit_latents
    student_x0 = flow_to_x0(latents, denoise(latents, sample.exit_timestep, batch.prompt_embeds), sample.exit_sigma)
    return _student_loss(student_x0, sample.scores, sample.control, config, relate)


def _student_loss(
    student_x0: Tensor,
    scores: Scores,
    control: ControlDraws,
    config: DistillConfig,
    relate: Callable[[Tensor], Tensor] | None,
) -> StepResult:
    loss = dmd_loss(student_x0, scores.direction)
    metrics = {"loss_dmd": loss.detach()}
    if config.method == CODMD:
        settings = copula_settings(config)
        terms = copula_terms(
            student_x0,
            scores.teacher_x0,
            scores.critic_x0,
            use_frame=settings.weight_frame > 0,
            use_batch=settings.weight_batch > 0,
            temperature=settings.temperature,
            features=settings.features,
            grid=settings.grid,
            reference_compat=settings.reference_compat,
            frame_permutation_BF=control.frame_permutation,
            batch_permutation_B=control.batch_permutation,
            permute_critic=settings.control == MATCHED,
            relate=relate,
        )
        if settings.control == NOISE:
            terms = replace_gradient(terms, student_x0, control)
        loss = loss + settings.scale * (settings.weight_frame * terms.frame + settings.weight_batch * terms.batch)
        metrics |= {"loss_frame": terms.frame.detach(), "loss_batch": terms.batch.detach()}
    return StepResult(loss=loss, metrics=metrics | score_metrics(student_x0, scores))


@final
@dataclass(frozen=True, slots=True)
class MatchingMethod:
    """codmd or dmd as a `registry.Method`."""

    name: str
    settings: type[MethodSettings] = CopulaConfig

    def configure(self, recipe: Recipe) -> DistillConfig:
        """Return `configure` of this method."""
        return configure(recipe, self.name)

    def turns(self, config: DistillConfig, iteration: int) -> tuple[str, ...]:
        """Return `matching_turns`."""
        return matching_turns(config, iteration)

    def draw(
        self,
        config: DistillConfig,
        role: str,
        iteration: int,
        shape: tuple[int, ...],
        device: torch.device,
        positions: range | None = None,
    ) -> MatchingDraws:
        """Draw one turn; student and critic of an iteration stop at the same exit steps."""
        rng, exit_rng = (named_rng(config.seed, name, iteration) for name in (role, "exit"))
        exit_step, exit_steps = draw_exits(config, exit_rng, shape[0])
        return draw_sample(config, rng, shape, exit_step, device, positions, exit_steps)

    def losses(self, turn: Turn) -> Iterator[StepResult]:
        """Yield the loss of each micro-batch of a turn."""
        config = turn.config
        relations = None
        if (
            turn.role == "student"
            and self._has_batch_term(config)
            and turn.processes.data_parallel * config.accumulate > 1
        ):
            relations = BatchRelations(
                config.accumulate, turn.processes, is_divided=copula_settings(config).reference_compat
            )
        if relations is not None and config.accumulate > 1:
            yield from self._related_losses(turn, relations)
            return
        for positions in turn.micro_batches():
            batch = turn.load(positions)
            draws = self.draw(config, turn.role, turn.iteration, turn.shape, turn.device, positions)
            if turn.role == "critic":
                yield critic_step(turn.networks, batch, draws, config)
            else:
                relate = None if relations is None else relations.of_micro_batch(0)
                yield student_step(turn.networks, batch, draws, config, relate)

    def _related_losses(self, turn: Turn, relations: BatchRelations) -> Iterator[StepResult]:
        # Two passes: the gradient of each micro-batch depends on the features of all others.
        config, samples = turn.config, []
        for positions in turn.micro_batches():
            draws = self.draw(config, turn.role, turn.iteration, turn.shape, turn.device, positions)
            sample, features_bVD = scored_sample(turn.networks, turn.load(positions), draws, config)
            samples.append(sample)
            relations.collect(features_bVD)
        for index, (positions, sample) in enumerate(zip(turn.micro_batches(), samples, strict=True)):
            relate = relations.of_micro_batch(index)
            yield resumed_student_step(turn.networks, turn.load(positions), sample, config, relate)

    def passes(self, config: DistillConfig) -> dict[str, Passes]:
        """Count the passes of each role's turn: the exit step is uniform."""
        before_exit = steps_before_exit(config)
        has_two_passes = self._has_batch_term(config) and config.accumulate > 1
        return {
            "student": Passes(
                turns=student_turns(config),
                student=before_exit + has_two_passes,
                critic=1.0,
                teacher=1.0,
                kept_latents=KEPT_LATENTS if has_two_passes else 0,
            ),
            "critic": Passes(turns=1.0, student=before_exit + 1),
        }

    def notes(self, config: DistillConfig) -> tuple[str, ...]:
        """Say what a plan counts for the batch term."""
        if not self._has_batch_term(config) or config.accumulate == 1:
            return ()
        return (
            f"copula.weight_batch relates all {config.batch_size} samples over {config.accumulate} micro-batches: one "
            "more student forward per sample, counted under rollout",
        )

    def authors_samples(self, config: DistillConfig) -> int | None:
        """Return the samples of one GPU in their configs; 64 and 32 samples are split over 32 GPUs."""
        return {"wan_1_3b": 2, "wan_14b": 1}.get(config.recipe)

    def teacher_sampling(self, config: DistillConfig) -> TeacherSampling | None:
        """Return None: the student is trained on prompts alone."""
        del config
        return None

    def _has_batch_term(self, config: DistillConfig) -> bool:
        settings = copula_settings(config)
        return self.name == CODMD and settings.scale * settings.weight_batch > 0
