"""One student step and one critic step of codmd and dmd, and the parts of them that the other methods share.

Batch and random draws in, loss and metrics out. Deterministic: every random number comes in through `StepDraws`. Knows
neither optimizers nor files.

Layout: B batch, C channels, F latent frames, H, W latent pixels, L prompt positions, D text width.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codmd_serve.grid import StepGrid
from codmd_serve.sampler import Denoise, rollout
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, add_noise, flow_to_x0, shift_sigma
from distill.config import DistillConfig, reference_sigma
from distill.data.prompts import Batch
from distill.losses.copula import copula_terms
from distill.losses.dmd import dmd_direction, dmd_loss
from distill.losses.flow import flow_loss
from distill.networks.build import Networks, denoiser, guided_teacher_flow


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDraws:
    """The random numbers of one student or critic step, on the training device.

    exit_step is the step at which the rollout stops; rollout_noise (exit_step + 1, B, C, F, H, W) and score_noise
    (B, C, F, H, W) are N(0, 1); score_sigma and score_timestep (B,) are the noise level at which teacher and critic
    look at the sample, and what they are told; frame_permutation (B, F) and batch_permutation (B,), int64, are those of
    the control arm, None outside it.
    """

    exit_step: int
    rollout_noise: Tensor
    score_noise: Tensor
    score_sigma: Tensor
    score_timestep: Tensor
    frame_permutation: Tensor | None = None
    batch_permutation: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """A scalar loss with gradient, and detached scalar metrics by name, all still on the device."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What teacher and critic say of a student sample that was noised again, (B, C, F, H, W), without gradient.

    direction is that of `dmd_direction`; teacher_x0 (guided) and critic_x0 are their clean predictions.
    """

    direction: Tensor
    teacher_x0: Tensor
    critic_x0: Tensor


def step_rng(seed: int, role: str, step: int, position: int = 0) -> torch.Generator:
    """Return the CPU generator of one role in one iteration, for one place in the batch where that matters."""
    digest = hashlib.sha256(f"{seed} {role} {step} {position}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_noise(rng: torch.Generator, shape: tuple[int, ...], positions: range) -> Tensor:
    """Draw N(0, 1) for some places of the batch, each from a stream of its own.

    Args:
        rng: in one state for all who compute a part of the batch; moves on by one number.
        shape: of one sample's noise.
        positions: places in the whole batch.

    Returns:
        (number of positions, *shape) float32: the same for a place whoever draws it, and nobody draws the noise of
        others, which for 64 videos of Wan's size would take seconds.
    """
    seed = int(torch.randint(2**62, (), generator=rng))
    rows = [torch.randn(shape, generator=step_rng(seed, "sample", 0, position)) for position in positions]
    return torch.stack(rows)


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
) -> StepDraws:
    """Draw everything random in one step, for the whole batch or some places of it.

    Args:
        config: gives the noise-level law and the control arm.
        rng: a CPU generator, so that a run draws the same numbers on every kind of device.
        shape: (B, C, F, H, W) of the whole batch's latents.
        exit_step: from `draw_exit_step`.
        device: where the numbers go.
        positions: places of the batch to draw for; None is all of them.

    Returns:
        Draws whose B is the number of positions, but for batch_permutation, which is the whole batch's.
    """
    batch_size, num_frames = shape[0], shape[2]
    places = range(batch_size) if positions is None else positions
    own = slice(places.start, places.stop)
    noise = sample_noise(rng, (exit_step + 2, *shape[1:]), places).movedim(1, 0).contiguous().to(device)
    sigma, timestep = draw_score_level(config, rng, batch_size, exit_step)
    frame_permutation = batch_permutation = None
    if config.copula.permute:
        frame_permutation = torch.rand((batch_size, num_frames), generator=rng).argsort(dim=1)[own].to(device)
        batch_permutation = torch.randperm(batch_size, generator=rng).to(device)
    return StepDraws(
        exit_step=exit_step,
        rollout_noise=noise[:-1],
        score_noise=noise[-1],
        score_sigma=sigma[own].to(device),
        score_timestep=timestep[own].to(device),
        frame_permutation=frame_permutation,
        batch_permutation=batch_permutation,
    )


def draw_score_level(
    config: DistillConfig, rng: torch.Generator, batch_size: int, exit_step: int
) -> tuple[Tensor, Tensor]:
    """Draw noise levels for the scores: uniform, shifted, clamped to the window of the exit step.

    Returns:
        sigma (B,) and the timesteps fed to the networks (B,), float32; one level for all with `copula.shared_sigma`.

    Source: CoDMD, copula_dmd/dmd.py@6a8259b, window "full". Deviation: levels are continuous and sigma is
    timestep / 1000; with `reference_compat` they are drawn from 0..999 and sigma is snapped to the authors' table.
    The windows "above" and "step" are of the kind of Self-Forcing's ts_schedule.
    """
    num_draws = 1 if config.copula.shared_sigma else batch_size
    level = torch.rand(num_draws, generator=rng)
    if config.reference_compat:
        level = (level * NUM_TRAIN_TIMESTEPS).floor() / NUM_TRAIN_TIMESTEPS
    low, high = score_window(config, exit_step)
    if config.score_window != "full":
        # Uniform before the shift and inside the window, so that no draw piles up at its ends.
        bottom, top = (shift_sigma(bound, 1.0 / config.score_shift) for bound in (low, high))
        level = bottom + (top - bottom) * level
    sigma = shift_sigma(level, config.score_shift).clamp(low, high)
    timestep = NUM_TRAIN_TIMESTEPS * sigma
    if config.reference_compat:
        sigma = torch.tensor([reference_sigma(value) for value in timestep.tolist()])
    return sigma.expand(batch_size), timestep.expand(batch_size)


def score_window(config: DistillConfig, exit_step: int) -> tuple[float, float]:
    """Return the lowest and highest noise level at which a sample that left at `exit_step` is judged.

    "full" judges every exit at all levels (published). The critic then learns the mixture of all exits: blurred early
    ones are made up for by late ones that spread too far. A step only has to be right from the level it is re-noised
    to, which is where "above" begins; "step" also ends at the step's own level, so that every level has one exit.
    """
    sigmas = config.grid().sigmas
    low, high = config.score_sigma_min, config.score_sigma_max
    if config.score_window != "full":
        low = min(max(low, sigmas[exit_step + 1]), high)
    if config.score_window == "step":
        high = max(min(high, sigmas[exit_step]), low)
    return low, high


def student_step(
    networks: Networks,
    batch: Batch,
    draws: StepDraws,
    config: DistillConfig,
    relate: Callable[[Tensor], Tensor] | None = None,
) -> StepResult:
    """Distribution matching plus, for method "codmd", the relational term, on one student sample.

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
    loss_dmd = dmd_loss(student_x0, scores.direction)
    relational, relational_metrics = _relational_loss(student_x0, scores, draws, config, relate)
    metrics = {"loss_dmd": loss_dmd.detach(), **relational_metrics, **score_metrics(student_x0, scores)}
    return StepResult(loss=loss_dmd + relational, metrics=metrics)


def critic_step(networks: Networks, batch: Batch, draws: StepDraws, config: DistillConfig) -> StepResult:
    """Flow matching of the critic on a fresh student sample.

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
    latents = add_noise(student_x0, draws.score_noise, draws.score_sigma)
    flow_pred = denoiser(networks.critic, networks.precision)(latents, draws.score_timestep, batch.prompt_embeds)
    return StepResult(loss=flow_loss(flow_pred, student_x0, draws.score_noise), metrics={})


def student_sample(
    denoise: Denoise, batch: Batch, draws: StepDraws, grid: StepGrid, sampler: str, *, with_grad: bool
) -> Tensor:
    """Roll the student out to the drawn exit step; with_grad: whether that step, and only that, carries gradient.

    Returns:
        x0_pred (B, C, F, H, W) of the exit step, float32 or wider.
    """
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
    networks: Networks, batch: Batch, student_x0: Tensor, draws: StepDraws, config: DistillConfig
) -> Scores:
    """Noise a student sample to the drawn level and let guided teacher and critic look at it, without gradient."""
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
        return Scores(
            direction=dmd_direction(student_x0, latents, teacher_flow, critic_flow, draws.score_sigma),
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


def _relational_loss(
    student_x0: Tensor,
    scores: Scores,
    draws: StepDraws,
    config: DistillConfig,
    relate: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    copula = config.copula
    if config.method == "dmd":
        return student_x0.new_zeros(()), {}
    terms = copula_terms(
        student_x0,
        scores.teacher_x0,
        scores.critic_x0,
        use_frame=copula.weight_frame > 0,
        use_batch=copula.weight_batch > 0,
        temperature=copula.temperature,
        features=copula.features,
        grid=copula.grid,
        reference_compat=config.reference_compat,
        frame_permutation_BF=draws.frame_permutation,
        batch_permutation_B=draws.batch_permutation,
        relate=relate,
    )
    loss = copula.scale * (copula.weight_frame * terms.frame + copula.weight_batch * terms.batch)
    return loss, {"loss_frame": terms.frame.detach(), "loss_batch": terms.batch.detach()}
