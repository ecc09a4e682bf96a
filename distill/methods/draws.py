"""What every method's turn is made of: the turn, its random numbers, its result, and the passes that a plan counts.

Every random number of a turn is drawn here or in the method's own file, on the CPU, as a function of seed, role and
iteration.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, shift_sigma
from distill.config import DistillConfig
from distill.data.prompts import Batch
from distill.networks.build import Networks
from distill.parallel.processes import Processes
from distill.streams import sample_noise

ROLES = ("student", "critic")
# The authors look sigma up in this table for both model sizes, whatever shift the scores are drawn with.
REFERENCE_TABLE_SHIFT = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """The turn of one role in one iteration, on this rank.

    Attributes:
        role: student or critic; its parameters get the gradient.
        iteration: counted from 0.
        config: of the run.
        networks: all three.
        processes: this rank among the others.
        shape: (B, C, F, H, W) of the whole batch's latents.
        device: where the networks are.
        load: places of the batch -> their prompts and, if the method trains on them, samples of the teacher.
        memory: tensors of `MethodSettings.memory` by name, equal on all ranks; the method changes them in place.
    """

    role: str
    iteration: int
    config: DistillConfig
    networks: Networks
    processes: Processes
    shape: tuple[int, ...]
    device: torch.device
    load: Callable[[range], Batch]
    memory: dict[str, Tensor] = field(default_factory=dict)

    def micro_batches(self) -> list[range]:
        """Return the places of the whole batch that this rank computes in each of its micro-batches."""
        batch_size, count = self.config.batch_size, self.config.accumulate
        return [self.processes.positions(batch_size, count, index) for index in range(count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """A scalar loss with gradient, and detached scalar metrics by name, all still on the device."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """How often the networks run in a turn of one role, per sample; means over the run.

    Attributes:
        turns: turns of the role per iteration.
        student: forwards of the student without gradient.
        critic: forwards of the critic without gradient.
        teacher: guided evaluations of the teacher.
        trained: forwards of the role's own network with gradient, and as many backwards.
        graphs: how many of those are held at once at most, activations included.
        derivatives: forward-mode derivatives of the student, in float32.
        kept_latents: tensors of the size of the latents that are kept for all micro-batches at once.
        gathered_latents: the same, kept for the whole batch on every rank, where there is more than one part of it.
        judged: forwards of the discriminator with gradient for the sample alone, and as many backwards.
        classified: forwards of the discriminator with gradient for its parameters, and as many backwards.
        token_plans: matrices of tokens x tokens that are held at once for the frames of one sample.
    """

    turns: float
    student: float = 0.0
    critic: float = 0.0
    teacher: float = 0.0
    trained: float = 1.0
    graphs: int = 1
    derivatives: float = 0.0
    kept_latents: int = 0
    gathered_latents: int = 0
    judged: float = 0.0
    classified: float = 0.0
    token_plans: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDraws:
    """The random numbers of a student rollout and of its scores, on the training device.

    Attributes:
        exit_step: denoising step at which the rollout stops; the last one of the whole batch where each sample has its
            own, so that all ranks call the student equally often.
        exit_steps: (B,) int64 on the CPU, the exit step of each sample; None where all have `exit_step`.
        rollout_noise: (exit_step + 1, B, C, F, H, W), N(0, 1).
        score_noise: (B, C, F, H, W), N(0, 1).
        score_sigma: (B,) noise level at which teacher and critic see the sample.
        score_timestep: (B,) what they are fed for it.
    """

    exit_step: int
    rollout_noise: Tensor
    score_noise: Tensor
    score_sigma: Tensor
    score_timestep: Tensor
    exit_steps: Tensor | None = None


def draw_exit_step(rng: torch.Generator, num_steps: int, first: int = 0) -> int:
    """Draw a rollout's last step, uniform in first..num_steps - 1; `rng` must be in one state on all ranks."""
    return int(torch.randint(first, num_steps, (), generator=rng))


def draw_exits(
    config: DistillConfig, rng: torch.Generator, batch_size: int, first: int = 0
) -> tuple[int, Tensor | None]:
    """Draw where the rollouts of a turn stop.

    Args:
        config: gives the number of steps, and exit_per_sample.
        rng: in one state on all ranks.
        batch_size: of the whole batch.
        first: the first step at which one may stop.

    Returns:
        `exit_step` and `exit_steps` of `StepDraws`, of the whole batch.

    Source: one per batch as in Self-Forcing; one per sample as in CoDMD, copula_dmd/dmd.py@aef0ec0 _run_generator.
    """
    num_steps = len(config.grid().timesteps)
    if not config.exit_per_sample:
        return draw_exit_step(rng, num_steps, first), None
    exit_steps = torch.randint(first, num_steps, (batch_size,), generator=rng)
    return int(exit_steps.max()), exit_steps


def steps_before_exit(config: DistillConfig, first: int = 0) -> float:
    """Return the mean number of steps that a rollout takes before its exit step, over `draw_exits`."""
    num_steps = len(config.grid().timesteps)
    if config.exit_per_sample:
        count = num_steps - first
        # The mean of the latest of the batch, which all its samples' rollouts take.
        return num_steps - 1 - sum((step / count) ** config.batch_size for step in range(1, count))
    return (num_steps - 1 + first) / 2


def draw_step(
    config: DistillConfig,
    rng: torch.Generator,
    shape: tuple[int, ...],
    exit_step: int,
    device: torch.device,
    positions: range | None = None,
    *,
    exit_steps: Tensor | None = None,
    reference_compat: bool = False,
) -> StepDraws:
    """Draw everything random in one step, for the whole batch or some places of it.

    Args:
        config: gives the law of the noise levels.
        rng: a CPU generator, so that a run draws the same numbers on every kind of device.
        shape: (B, C, F, H, W) of the whole batch's latents.
        exit_step: from `draw_exit_step`, or the largest of `exit_steps`.
        device: where the numbers go.
        positions: places of the batch to draw for; None is all of them.
        exit_steps: from `draw_exits`, of the whole batch; None stops all samples at `exit_step`.
        reference_compat: draw noise levels as the authors do, see `draw_score_level`.

    Returns:
        Draws whose B is the number of positions.
    """
    batch_size = shape[0]
    places = range(batch_size) if positions is None else positions
    own = slice(places.start, places.stop)
    noise = sample_noise(rng, (exit_step + 2, *shape[1:]), places).movedim(1, 0).contiguous().to(device)
    sigma, timestep = draw_score_level(
        config, rng, batch_size, exit_step if exit_steps is None else exit_steps, reference_compat=reference_compat
    )
    return StepDraws(
        exit_step=exit_step,
        exit_steps=None if exit_steps is None else exit_steps[own],
        rollout_noise=noise[:-1],
        score_noise=noise[-1],
        score_sigma=sigma[own].to(device),
        score_timestep=timestep[own].to(device),
    )


def draw_score_level(
    config: DistillConfig,
    rng: torch.Generator,
    batch_size: int,
    exit_step: int | Tensor,
    *,
    reference_compat: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw noise levels for the scores: uniform, shifted, clamped to the window of the exit step.

    Args:
        config: score_shift, score_sigma_min, score_sigma_max, score_window, score_shared_sigma.
        rng: in one state on all ranks.
        batch_size: of the whole batch.
        exit_step: chooses the window; one of the batch, or (B,) of each sample.
        reference_compat: draw timesteps from 0..999 and snap sigma to the authors' table, as they do.

    Returns:
        sigma (B,) and the timesteps fed to the networks (B,), float32.

    Source: CoDMD, copula_dmd/dmd.py@6a8259b, window "full". Deviation: levels are continuous and sigma is
    timestep / 1000. The windows "above" and "step" resemble Self-Forcing's ts_schedule.
    """
    num_draws = 1 if config.score_shared_sigma else batch_size
    level = torch.rand(num_draws, generator=rng)
    if reference_compat:
        level = (level * NUM_TRAIN_TIMESTEPS).floor() / NUM_TRAIN_TIMESTEPS
    low, high = _windows(config, exit_step)
    if config.score_window != "full":
        # Uniform before the shift and inside the window, so that no draw piles up at its ends.
        bottom, top = (shift_sigma(bound, 1.0 / config.score_shift) for bound in (low, high))
        level = bottom + (top - bottom) * level
    sigma = shift_sigma(level, config.score_shift).clamp(low, high).float()
    timestep = NUM_TRAIN_TIMESTEPS * sigma
    if reference_compat:
        sigma = torch.tensor([reference_sigma(value) for value in timestep.tolist()])
    return sigma.expand(batch_size), timestep.expand(batch_size)


def _windows(config: DistillConfig, exit_step: int | Tensor) -> tuple[Any, Any]:
    """Return the bounds of `score_window`: two numbers, or two float64 tensors (B,) where samples differ."""
    if isinstance(exit_step, int):
        return score_window(config, exit_step)
    if config.score_window == "full":
        return score_window(config, 0)
    lows, highs = zip(*(score_window(config, step) for step in exit_step.tolist()), strict=True)
    return torch.tensor(lows, dtype=torch.float64), torch.tensor(highs, dtype=torch.float64)


def score_window(config: DistillConfig, exit_step: int) -> tuple[float, float]:
    """Return the lowest and highest noise level at which a sample that left at `exit_step` is scored.

    "full" scores every exit at all levels (published). The critic then sees samples of all exit steps, so blurry early
    exits can be balanced by over-dispersed late ones. "above" starts at the level to which the sample is re-noised
    next: a step has to be right only from there on. "step" also ends at the step's own level, so that every level
    belongs to one exit step.
    """
    sigmas = config.grid().sigmas
    low, high = config.score_sigma_min, config.score_sigma_max
    if config.score_window != "full":
        low = min(max(low, sigmas[exit_step + 1]), high)
    if config.score_window == "step":
        high = max(min(high, sigmas[exit_step]), low)
    return low, high


def reference_sigma(timestep: float) -> float:
    """Return the entry of the authors' 1000-entry shift-8 table nearest to timestep / 1000.

    Source: CoDMD@6a8259b looks every sigma up this way while the network is fed the timestep itself; off by up to
    .0035. Kept for `copula.reference_compat` only.
    """
    # Entry i is shift_8(1 - i / 1000); its inverse gives the neighbourhood, so no table is needed.
    level = timestep / NUM_TRAIN_TIMESTEPS
    position = NUM_TRAIN_TIMESTEPS * shift_sigma(level, 1.0 / REFERENCE_TABLE_SHIFT)
    entries = [
        shift_sigma(index / NUM_TRAIN_TIMESTEPS, REFERENCE_TABLE_SHIFT)
        for index in {max(math.floor(position), 1), max(math.ceil(position), 1)}
    ]
    return min(entries, key=lambda entry: abs(entry - level))
