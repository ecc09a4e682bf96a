"""Rivals of the relational term as arms: dmd2, f-distill, avd and vdot are dmd with one or more further terms.

Each term has a file of its own (gan.py, f_distill.py, avd.py, transport.py). Here they are put together: settings,
draws, turns. All four names have the same settings, so that any term can be switched on in any of them.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.grid import StepGrid
from codmd_serve.schedule import flow_to_x0
from distill.config import DistillConfig, MethodSettings, OptimizerConfig, Recipe
from distill.data.teacher_latents import TeacherSampling
from distill.losses.divergence import JENSEN_SHANNON
from distill.losses.dmd import dmd_loss
from distill.losses.gan import with_gradient
from distill.losses.motion import motion_loss
from distill.methods import matching
from distill.methods.avd import ERROR_MEANS, NO_ERROR, AvdConfig, RegressionDraws, note_errors, regression_results
from distill.methods.draws import (
    Passes,
    StepDraws,
    StepResult,
    Turn,
    draw_exits,
    draw_score_level,
    draw_step,
    steps_before_exit,
)
from distill.methods.exits import exit_levels
from distill.methods.f_distill import RATIO_MEANS, FDistillConfig, sample_weights
from distill.methods.gan import GanConfig, NoisedAt, Verdict, discriminator_results, judge
from distill.methods.scores import Scores, critic_result, score_metrics, score_sample, student_sample
from distill.methods.transport import FRAME, TOKEN_PLANS, TransportConfig, sample_direction
from distill.networks.build import denoiser
from distill.settings import HeadConfig, check_range
from distill.streams import named_rng, sample_noise

DMD2, F_DISTILL, AVD, VDOT = "dmd2", "f-distill", "avd", "vdot"


@dataclass(frozen=True, kw_only=True, slots=True)
class TermsConfig(MethodSettings):
    """Settings of dmd2, f-distill, avd and vdot: terms beside that of DMD. A weight of 0 leaves a term out.

    Attributes:
        gan: DMD2's discriminator.
        f_distill: the weight of each sample by an f-divergence.
        avd: regression on real videos, and motion.
        transport: optimal transport from critic to teacher.
        data_steps, data_shift: Euler steps of the teacher behind each real sample, and their shift; unused where the
            prompts come with latents.
        data_samples: number of such samples; 0 makes one for each prompt.
    """

    group: ClassVar[str] = "terms"

    gan: GanConfig = field(default_factory=GanConfig)
    f_distill: FDistillConfig = field(default_factory=FDistillConfig)
    avd: AvdConfig = field(default_factory=AvdConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    data_steps: int = 50
    data_shift: float = 3.0
    data_samples: int = 0

    def __post_init__(self) -> None:
        check_range("terms.data_steps", self.data_steps, 1, 10_000)
        check_range("terms.data_shift", self.data_shift, 1e-3, 1e3)
        check_range("terms.data_samples", self.data_samples, 0, 10**9)

    def check(self, config: DistillConfig) -> None:
        """Refuse terms that lack what they need.

        Raises:
            ConfigError: names the key.
        """
        has_head = self.critic_head() is not None
        if self.gan.weight > 0 and not has_head:
            raise ConfigError("terms.gan.weight needs terms.gan.critic_weight above 0: it is the discriminator's own")
        self.f_distill.check_discriminator(is_there=has_head, shares_noise=self.gan.shares_noise)
        self.transport.check_batch(config.batch_size)
        if has_head and config.context_parallel > 1:
            raise ConfigError(
                f"context_parallel must be 1 with a discriminator, got {config.context_parallel}: its head pools the "
                "tokens of a whole video"
            )

    def step_grid(self, config: DistillConfig) -> StepGrid:
        """Return `shifted_grid`."""
        return matching.shifted_grid(config)

    def critic_head(self) -> HeadConfig | None:
        """Return the discriminator's head."""
        return self.gan.head

    def data_roles(self) -> frozenset[str]:
        """Return who needs real latents: the student for regression, the critic for its discriminator."""
        student = {"student"} if self.avd.regression_weight > 0 else set()
        return frozenset(student | ({"critic"} if self.critic_head() is not None else set()))

    def memory(self, config: DistillConfig) -> dict[str, tuple[float, ...]]:
        """Return the running means: of the ratio, which starts as 1, and of the error, of which there is none yet."""
        means: dict[str, tuple[float, ...]] = {}
        if self.f_distill.is_on:
            means[RATIO_MEANS] = (1.0,) * self.f_distill.bins
        if self.avd.regression_weight > 0:
            means[ERROR_MEANS] = (NO_ERROR,) * len(config.grid().timesteps)
        return means

    @property
    def relates_samples(self) -> bool:
        """Whether the loss of one sample depends on the others of the batch."""
        return self.f_distill.is_on or self.transport.relates_samples


# DMD2 on SDXL: experiments/sdxl/*_gan5e-3_*.sh@4e54501.
_DMD2_GAN = GanConfig(weight=5e-3, critic_weight=1e-2)
_TERMS: dict[str, TermsConfig] = {
    DMD2: TermsConfig(gan=_DMD2_GAN),
    # FastGen@34f30e8: Jensen-Shannon, ratio in .1..20, 10 bins; weight and noise of its configs for SDXL.
    F_DISTILL: TermsConfig(
        gan=dataclasses.replace(_DMD2_GAN, shares_noise=True), f_distill=FDistillConfig(divergence=JENSEN_SHANNON)
    ),
    AVD: TermsConfig(avd=AvdConfig(regression_weight=1.0, motion_weight=0.05)),
    # VDOT (arXiv 2512.06802) has a discriminator too. The term's constants are ours: the paper was not at hand.
    VDOT: TermsConfig(gan=_DMD2_GAN, transport=TransportConfig(weight=1.0)),
}
# AVD on Wan, configs/wan_bidirectional_dmd.yaml@0a71f0e; its 5 in cond + 5 * (cond - uncond) is guidance_scale 6.
_AVD_WAN: dict[str, Any] = {
    "optimizer": OptimizerConfig(student_lr=2e-6, critic_lr=2e-6),
    "guidance_scale": 6.0,
    "score_shift": 5.0,
    "timesteps": (1000.0, 900.0, 757.0, 522.0),
}


def configure(recipe: Recipe, method: str) -> DistillConfig:
    """Return the settings of a recipe by one of the arms: those of dmd, with the published weights of its terms.

    On Wan, avd also has its authors' rates, guidance, levels and steps. Heads of small teachers are narrower.
    """
    config, terms = matching.configure(recipe), _TERMS[method]
    if not recipe.name.startswith("wan_"):
        gan = dataclasses.replace(terms.gan, width=128, queries=4)
        terms = dataclasses.replace(terms, gan=gan, data_steps=25)
        return dataclasses.replace(config, method=method, method_settings=terms)
    own = _AVD_WAN if method == AVD else {}
    return dataclasses.replace(config, method=method, method_settings=terms, **own)


def terms_settings(config: DistillConfig) -> TermsConfig:
    """Return the settings of a config of one of the arms."""
    assert isinstance(config.method_settings, TermsConfig)
    return config.method_settings


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmDraws(StepDraws):
    """`StepDraws` with what the terms of this turn draw besides.

    Attributes:
        noised: by "fake" and "real", the noise in which the discriminator sees them; a student's turn has no "real".
        regression: of avd; None where it is off.
    """

    noised: dict[str, NoisedAt]
    regression: RegressionDraws | None


def draw_arm(
    config: DistillConfig,
    role: str,
    iteration: int,
    shape: tuple[int, ...],
    device: torch.device,
    positions: range | None = None,
) -> ArmDraws:
    """Draw one turn. What dmd draws comes first, so that arms of one seed share it."""
    settings, rng = terms_settings(config), named_rng(config.seed, role, iteration)
    exit_step, exit_steps = draw_exits(config, named_rng(config.seed, "exit", iteration), shape[0])
    step = draw_step(config, rng, shape, exit_step, device, positions, exit_steps=exit_steps)
    places = range(shape[0]) if positions is None else positions
    own = slice(places.start, places.stop)
    scored = NoisedAt(noise=step.score_noise, sigma=step.score_sigma, timestep=step.score_timestep)
    noised, regression = {}, None
    if settings.critic_head() is not None:
        for name in ("fake", "real") if role == "critic" else ("fake",):
            if settings.gan.shares_noise:
                noised[name] = scored
                continue
            sigma, timestep = draw_score_level(config, rng, shape[0], exit_step if exit_steps is None else exit_steps)
            noise = sample_noise(rng, shape[1:], places).to(device)
            noised[name] = NoisedAt(noise=noise, sigma=sigma[own].to(device), timestep=timestep[own].to(device))
    if settings.avd.regression_weight > 0 and role == "student":
        level = torch.randint(len(config.grid().timesteps), (shape[0],), generator=rng)[own].to(device)
        regression = RegressionDraws(level=level, noise=sample_noise(rng, shape[1:], places).to(device))
    shared = {entry.name: getattr(step, entry.name) for entry in dataclasses.fields(step)}
    return ArmDraws(**shared, noised=noised, regression=regression)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A student sample with all that its loss needs; constants.

    Attributes:
        exit_latents: input of the exit step.
        exit_sigma, exit_timestep: from `exit_levels`.
        scores: of critic and teacher.
        sigma: (B,) level of the scores.
        verdict: of the discriminator; None without one.
    """

    exit_latents: Tensor
    exit_sigma: float | Tensor
    exit_timestep: Tensor
    scores: Scores
    sigma: Tensor
    verdict: Verdict | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """What the terms need of the whole batch, in the order of its places; None where no term does.

    Attributes:
        weights: (B,) of f-distill.
        predictions: critic's and teacher's x0, (B, C, F, H, W).
    """

    weights: Tensor | None = None
    predictions: tuple[Tensor, Tensor] | None = None


def judged_sample(turn: Turn, positions: range, draws: ArmDraws, *, with_grad: bool) -> tuple[Tensor, Judged]:
    """Sample the student for a micro-batch, score it and have it judged.

    Returns:
        x0 of the exit step, with the student's gradient if `with_grad`, and what was found.
    """
    networks, batch, config = turn.networks, turn.load(positions), turn.config
    denoise, inputs = denoiser(networks.student, networks.precision), list[Tensor]()

    def note_input(latents: Tensor, timestep_B: Tensor, prompt_embeds_BLD: Tensor) -> Tensor:
        inputs[:] = [latents]
        return denoise(latents, timestep_B, prompt_embeds_BLD)

    student_x0 = student_sample(note_input, batch, draws, config.grid(), config.sampler, with_grad=with_grad)
    sample = student_x0.detach()
    scores = score_sample(networks, batch, sample, draws, config)
    verdict = judge(networks, batch, sample, draws.noised["fake"]) if draws.noised else None
    exit_sigma, exit_timestep = exit_levels(draws, config.grid(), len(sample), sample.device)
    judged = Judged(
        exit_latents=inputs[0],
        exit_sigma=exit_sigma,
        exit_timestep=exit_timestep,
        scores=scores,
        sigma=draws.score_sigma,
        verdict=verdict,
    )
    return student_x0, judged


def gathered(turn: Turn, parts: list[Judged]) -> Whole:
    """Return what the terms need of the whole batch, and move the running means of f-distill.

    A collective: all ranks call it, with all their micro-batches.
    """
    settings = terms_settings(turn.config)

    def joined(tensors: list[Tensor]) -> Tensor:
        whole = [turn.processes.gather_samples(tensor) for tensor in tensors]
        return whole[0] if len(whole) == 1 else torch.cat(whole)

    weights = predictions = None
    if settings.f_distill.is_on:
        logits = joined([part.verdict.logits for part in parts if part.verdict is not None])
        sigma = joined([part.sigma for part in parts])
        weights = sample_weights(logits, sigma, settings.f_distill, turn.memory[RATIO_MEANS])
    if settings.transport.relates_samples:
        predictions = (
            joined([part.scores.critic_x0 for part in parts]),
            joined([part.scores.teacher_x0 for part in parts]),
        )
    return Whole(weights=weights, predictions=predictions)


def student_loss(
    student_x0: Tensor, judged: Judged, whole: Whole, positions: range, settings: TermsConfig
) -> StepResult:
    """Return the loss of a micro-batch: DMD and the terms that are on.

    Args:
        student_x0: (B, C, F, H, W) with gradient.
        judged: found at the same sample.
        whole: of the whole batch.
        positions: places of the micro-batch in it.
        settings: of the terms.

    Returns:
        Loss and metrics loss_dmd, those of `score_metrics`, and loss_gan, weight_max, loss_transport and loss_motion
        where these terms are on.
    """
    own = slice(positions.start, positions.stop)
    direction, scores = judged.scores.direction, judged.scores
    metrics = score_metrics(student_x0, scores)
    if whole.weights is not None:
        metrics["weight_max"] = whole.weights.max()
        direction = whole.weights[own].view(-1, 1, 1, 1, 1) * direction
    loss = dmd_loss(student_x0, direction)
    metrics["loss_dmd"] = loss.detach()
    if judged.verdict is not None:
        gan = with_gradient(judged.verdict.loss, student_x0, judged.verdict.gradient)
        loss = loss + settings.gan.weight * gan
        metrics["loss_gan"] = gan.detach()
    if settings.transport.weight > 0:
        moved = sample_direction(student_x0.detach(), scores, settings.transport, whole.predictions, own)
        transport = dmd_loss(student_x0, moved)
        loss = loss + settings.transport.weight * transport
        metrics["loss_transport"] = transport.detach()
    if settings.avd.motion_weight > 0:
        motion = motion_loss(student_x0, settings.avd.motion_threshold)
        loss = loss + settings.avd.motion_weight * motion
        metrics["loss_motion"] = motion.detach()
    return StepResult(loss=loss, metrics=metrics)


@final
@dataclass(frozen=True, slots=True)
class ArmMethod:
    """dmd2, f-distill, avd or vdot as a `registry.Method`."""

    name: str
    settings: type[MethodSettings] = TermsConfig

    def configure(self, recipe: Recipe) -> DistillConfig:
        """Return `configure` of this method."""
        return configure(recipe, self.name)

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
    ) -> ArmDraws:
        """Return `draw_arm`."""
        return draw_arm(config, role, iteration, shape, device, positions)

    def losses(self, turn: Turn) -> Iterator[StepResult]:
        """Yield the losses of each micro-batch of a turn, one for each graph; they add up to the turn's loss."""
        if turn.role == "critic":
            yield from self._critic_losses(turn)
            return
        yield from self._student_losses(turn)
        if terms_settings(turn.config).avd.regression_weight > 0:
            yield from self._regression_losses(turn)

    def _draws(self, turn: Turn) -> Iterator[tuple[range, ArmDraws]]:
        for positions in turn.micro_batches():
            yield positions, self.draw(turn.config, turn.role, turn.iteration, turn.shape, turn.device, positions)

    def _critic_losses(self, turn: Turn) -> Iterator[StepResult]:
        networks, config, settings = turn.networks, turn.config, terms_settings(turn.config)
        denoise = denoiser(networks.student, networks.precision)
        for positions, draws in self._draws(turn):
            batch = turn.load(positions)
            student_x0 = student_sample(denoise, batch, draws, config.grid(), config.sampler, with_grad=False)
            yield critic_result(networks, batch, student_x0, draws)
            if draws.noised:
                weight = settings.gan.critic_weight
                yield from discriminator_results(networks, batch, student_x0, draws.noised, weight)

    def _student_losses(self, turn: Turn) -> Iterator[StepResult]:
        settings, config = terms_settings(turn.config), turn.config
        if settings.relates_samples and config.accumulate > 1:
            yield from self._related_losses(turn)
            return
        for positions, draws in self._draws(turn):
            student_x0, judged = judged_sample(turn, positions, draws, with_grad=True)
            yield student_loss(student_x0, judged, gathered(turn, [judged]), positions, settings)

    def _related_losses(self, turn: Turn) -> Iterator[StepResult]:
        # Two passes: what a micro-batch's loss is depends on all others.
        settings, networks, parts = terms_settings(turn.config), turn.networks, []
        for positions, draws in self._draws(turn):
            with torch.no_grad():
                parts.append(judged_sample(turn, positions, draws, with_grad=False)[1])
        whole = gathered(turn, parts)
        for positions, judged in zip(turn.micro_batches(), parts, strict=True):
            latents, embeds = judged.exit_latents, turn.load(positions).prompt_embeds
            flow_pred = denoiser(networks.student, networks.precision)(latents, judged.exit_timestep, embeds)
            student_x0 = flow_to_x0(latents, flow_pred, judged.exit_sigma)
            yield student_loss(student_x0, judged, whole, positions, settings)

    def _regression_losses(self, turn: Turn) -> Iterator[StepResult]:
        settings, means = terms_settings(turn.config).avd, turn.memory[ERROR_MEANS]
        levels, errors = [], []
        for positions, draws in self._draws(turn):
            assert draws.regression is not None
            batch, grid = turn.load(positions), turn.config.grid()
            for result, error_B in regression_results(turn.networks, batch, draws.regression, grid, settings, means):
                levels.append(draws.regression.level)
                errors.append(error_B)
                yield result
        gather = turn.processes.gather_samples
        note_errors(means, gather(torch.cat(levels)), gather(torch.cat(errors)), settings.error_decay)

    def passes(self, config: DistillConfig) -> dict[str, Passes]:
        """Count the passes of each role's turn: the exit step is uniform."""
        settings, before_exit = terms_settings(config), steps_before_exit(config)
        has_head = settings.critic_head() is not None
        has_two_passes = settings.relates_samples and config.accumulate > 1
        plans = TOKEN_PLANS if settings.transport.weight > 0 and settings.transport.over == FRAME else 0
        return {
            "student": Passes(
                turns=matching.student_turns(config),
                student=before_exit + has_two_passes,
                critic=1.0,
                teacher=1.0,
                trained=1.0 + (settings.avd.regression_weight > 0),
                judged=float(has_head),
                kept_latents=matching.KEPT_LATENTS + has_head if has_two_passes else 0,
                gathered_latents=2 if settings.transport.relates_samples else 0,
                token_plans=plans,
            ),
            "critic": Passes(turns=1.0, student=before_exit + 1, classified=2.0 * has_head),
        }

    def notes(self, config: DistillConfig) -> tuple[str, ...]:
        """Say what a plan counts for the terms."""
        settings, notes = terms_settings(config), []
        if settings.relates_samples and config.accumulate > 1:
            notes.append(
                f"the terms relate all {config.batch_size} samples over {config.accumulate} micro-batches: one more "
                "student forward per sample, counted under rollout"
            )
        if settings.transport.weight > 0:
            notes.append("Sinkhorn's iterations are no matrix products and are not counted as operations")
        return tuple(notes)

    def authors_samples(self, config: DistillConfig) -> int | None:
        """Return None: no plan of the authors' layout."""
        del config
        return None

    def teacher_sampling(self, config: DistillConfig) -> TeacherSampling | None:
        """Return how real latents are made where the prompts bring none; None where no term needs them."""
        settings = terms_settings(config)
        if not settings.data_roles():
            return None
        return TeacherSampling(
            num_steps=settings.data_steps, shift=settings.data_shift, num_samples=settings.data_samples or None
        )
