"""What every method's turn is made of: the turn, its random numbers, its result, and the passes that a plan counts.

Every random number of a turn is drawn here or in the method's own file, on the CPU, as a function of seed, role and
iteration.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

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
        exit_step: denoising step at which the rollout stops.
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


def draw_exit_step(rng: torch.Generator, num_steps: int, first: int = 0) -> int:
    """Draw a rollout's last step, uniform in first..num_steps - 1; `rng` must be in one state on all ranks."""
    return int(torch.randint(first, num_steps, (), generator=rng))


def draw_step(
    config: DistillConfig,
    rng: torch.Generator,
    shape: tuple[int, ...],
    exit_step: int,
    device: torch.device,
    positions: range | None = None,
    *,
    reference_compat: bool = False,
) -> StepDraws:
    """Draw everything random in one step, for the whole batch or some places of it.

    Args:
        config: gives the law of the noise levels.
        rng: a CPU generator, so that a run draws the same numbers on every kind of device.
        shape: (B, C, F, H, W) of the whole batch's latents.
        exit_step: from `draw_exit_step`.
        device: where the numbers go.
        positions: places of the batch to draw for; None is all of them.
        reference_compat: draw noise levels as the authors do, see `draw_score_level`.

    Returns:
        Draws whose B is the number of positions.
    """
    batch_size = shape[0]
    places = range(batch_size) if positions is None else positions
    own = slice(places.start, places.stop)
    noise = sample_noise(rng, (exit_step + 2, *shape[1:]), places).movedim(1, 0).contiguous().to(device)
    sigma, timestep = draw_score_level(config, rng, batch_size, exit_step, reference_compat=reference_compat)
    return StepDraws(
        exit_step=exit_step,
        rollout_noise=noise[:-1],
        score_noise=noise[-1],
        score_sigma=sigma[own].to(device),
        score_timestep=timestep[own].to(device),
    )


def draw_score_level(
    config: DistillConfig, rng: torch.Generator, batch_size: int, exit_step: int, *, reference_compat: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw noise levels for the scores: uniform, shifted, clamped to the window of the exit step.

    Args:
        config: score_shift, score_sigma_min, score_sigma_max, score_window, score_shared_sigma.
        rng: in one state on all ranks.
        batch_size: of the whole batch.
        exit_step: chooses the window.
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
    low, high = score_window(config, exit_step)
    if config.score_window != "full":
        # Uniform before the shift and inside the window, so that no draw piles up at its ends.
        bottom, top = (shift_sigma(bound, 1.0 / config.score_shift) for bound in (low, high))
        level = bottom + (top - bottom) * level
    sigma = shift_sigma(level, config.score_shift).clamp(low, high)
    timestep = NUM_TRAIN_TIMESTEPS * sigma
    if reference_compat:
        sigma = torch.tensor([reference_sigma(value) for value in timestep.tolist()])
    return sigma.expand(batch_size), timestep.expand(batch_size)


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
