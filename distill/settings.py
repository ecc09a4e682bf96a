"""The groups of settings that `DistillConfig` is made of, as frozen dataclasses, and their ranges; computes nothing."""

import math
from dataclasses import dataclass
from itertools import pairwise

from codmd_serve.errors import ConfigError
from distill.losses.copula import FEATURES

EMA_KINDS = ("constant", "power")


@dataclass(frozen=True, kw_only=True, slots=True)
class CopulaConfig:
    """The relational term; its weight in the loss is scale * (weight_frame * frame + weight_batch * batch)."""

    scale: float = 0.1
    weight_frame: float = 1.0
    weight_batch: float = 0.0
    temperature: float = 0.1
    features: str = "mean"  # "spatial" sees motion that keeps channel means
    grid: int = 2  # cells per side of "spatial"
    shared_sigma: bool = False  # one score noise level per batch: relations of samples then share their cause
    permute: bool = False  # control arm: teacher frames and samples shuffled before their relations are taken

    def __post_init__(self) -> None:
        check_choice("copula.features", self.features, FEATURES)
        check_range("copula.temperature", self.temperature, 1e-4, 10.0)
        check_range("copula.grid", self.grid, 1, 64)
        for name in ("scale", "weight_frame", "weight_batch"):
            check_range(f"copula.{name}", getattr(self, name), 0.0, 1e4)


@dataclass(frozen=True, kw_only=True, slots=True)
class RcmConfig:
    """Settings of the methods rcm and dcm: a consistency term on samples of the teacher, and distribution matching.

    The consistency term weighs scm_weight * sqrt(N / 2.0e6) for latents of N elements, which at Wan's size is the
    published 100: its gradient does not grow with N, that of the summed matching term grows with sqrt(N).
    """

    scm_weight: float = 100.0
    dmd_weight: float = 1.0  # 0 is a plain consistency model, without critic
    # log tan(theta) of the consistency term ~ N(theta_mean, theta_std^2); published .7 is -.8 + .5 * log(21 frames).
    theta_mean: float = 0.7
    theta_std: float = 1.6
    warmup_steps: int = 0  # first iterations: consistency term alone, its tangent growing from 0 to 1 (rcm)
    discrete_steps: int = 48  # dcm: parts that the quarter turn from clean to noise is cut into
    # The student's steps, where `timesteps` is empty: atan(sigma_max), then sample_thetas.
    sigma_max: float = 80.0
    sample_thetas: tuple[float, ...] = (1.5, 1.4, 1.0)
    # Euler steps of the teacher behind each training latent, and how they are shifted.
    data_steps: int = 50
    data_shift: float = 3.0

    def __post_init__(self) -> None:
        check_range("rcm.scm_weight", self.scm_weight, 1e-6, 1e6)
        check_range("rcm.dmd_weight", self.dmd_weight, 0.0, 1e6)
        check_range("rcm.theta_mean", self.theta_mean, -10.0, 10.0)
        check_range("rcm.theta_std", self.theta_std, 0.0, 10.0)
        check_range("rcm.warmup_steps", self.warmup_steps, 0, 10**9)
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

    def levels(self) -> tuple[float, ...]:
        """Noise levels sigma of the student's steps, without the last 0: tan(theta) / (1 + tan(theta))."""
        ratios = (self.sigma_max, *(math.tan(theta) for theta in self.sample_thetas))
        return tuple(ratio / (1.0 + ratio) for ratio in ratios)


@dataclass(frozen=True, kw_only=True, slots=True)
class DpDmdConfig:
    """Settings of the method dp-dmd: the student's first flow leads to where the teacher is after some of its steps."""

    weight: float = 0.05
    teacher_steps: int = 30  # Euler steps of the teacher's whole way
    match_step: int = 10  # after how many of them it is met
    shift: float = 3.0  # of the teacher's steps

    def __post_init__(self) -> None:
        check_range("dp_dmd.weight", self.weight, 0.0, 1e4)
        check_range("dp_dmd.teacher_steps", self.teacher_steps, 1, 10_000)
        check_range("dp_dmd.match_step", self.match_step, 1, self.teacher_steps)
        check_range("dp_dmd.shift", self.shift, 1e-3, 1e3)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW of student and critic. betas[0] = 0 is the other published choice."""

    student_lr: float
    critic_lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 10.0  # None (null in JSON) is off
    warmup_updates: int = 0  # linear, of each network's own updates

    def __post_init__(self) -> None:
        for name in ("student_lr", "critic_lr", "eps"):
            check_range(f"optimizer.{name}", getattr(self, name), 1e-12, 1.0)
        for beta in self.betas:
            check_range("optimizer.betas", beta, 0.0, 0.99999)
        check_range("optimizer.weight_decay", self.weight_decay, 0.0, 1.0)
        if self.clip_norm is not None:
            check_range("optimizer.clip_norm", self.clip_norm, 1e-6, 1e6)
        check_range("optimizer.warmup_updates", self.warmup_updates, 0, 10**6)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """Moving average of the student in float32; it ticks on student updates and is a plain copy before the start.

    kind "constant" forgets at the same rate for ever; "power" averages over the same share of all updates so far,
    and then `length` counts and `decay` does not.
    """

    decay: float
    start_update: int = 0
    kind: str = "constant"
    length: float = 0.1  # standard deviation of the averaged updates over their number

    def __post_init__(self) -> None:
        check_choice("ema.kind", self.kind, EMA_KINDS)
        # Above .288 the weights of a power average would fall with the update's number.
        check_range("ema.length", self.length, 1e-3, 0.28)
        check_range("ema.decay", self.decay, 0.0, 0.999999)
        check_range("ema.start_update", self.start_update, 0, 10**7)


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeConfig:
    """The video trained on: pixels, frames, frames per second."""

    height: int
    width: int
    num_frames: int
    fps: int

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "fps"):
            check_range(f"native.{name}", getattr(self, name), 1, 10_000)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError, naming the key, unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {value!r}")


def check_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError, naming the key, unless `value` is in low..high; NaN is not."""
    if not low <= value <= high:
        raise ConfigError(f"{key} must be in {low:g}..{high:g}, got {value!r}")
