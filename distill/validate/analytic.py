"""Scores of a student in an analytic world during training: margins, dependence, modes and the joint law, apart."""

from dataclasses import asdict, dataclass, field
from typing import final

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.networks.analytic import AnalyticBase
from distill.networks.base import Base
from distill.validate.suites import LATENTS, Request, Samples
from distill.worlds.analytic.metrics import Judge
from distill.worlds.analytic.sampling import initial_noise, law_samples, teacher_samples

SAMPLES_PER_CAPTION = 256
# Not those of `eval compare`, whose reported scores a run must not be chosen by.
REFERENCE_SEED = 77
REFERENCE_STEPS = 100
LOW = ("tau_err", "frame_rho", "cross_rho", "w1", "energy", "mode_tv", "mode_miss")


def analytic_suite(config: DistillConfig, base: Base) -> "AnalyticSuite":
    """Sample the reference of a run: the law itself, or that of the guided exact teacher.

    Raises:
        ConfigError: the base is no analytic world.
    """
    if not isinstance(base, AnalyticBase):
        raise ConfigError(f"suite analytic scores analytic worlds, and {base.source} is none")
    world = base.world
    if config.guidance_scale == 1.0:
        reference = law_samples(world, SAMPLES_PER_CAPTION, REFERENCE_SEED)
    else:
        (noise,) = initial_noise(world, SAMPLES_PER_CAPTION, 1, REFERENCE_SEED)
        reference = teacher_samples(world, noise, config.guidance_scale, REFERENCE_STEPS)[-1]
    requests = tuple(Request(caption, seed) for caption in world.captions() for seed in range(SAMPLES_PER_CAPTION))
    return AnalyticSuite(judge=Judge(world, reference), requests=requests)


@final
@dataclass(frozen=True, kw_only=True)
class AnalyticSuite:
    """All captions of a world, many samples of each.

    Attributes:
        judge: has the reference.
        requests: caption by caption.
        better: the scores whose best value is the lowest; `kept`, `tau_kept` and `sd_ratio`, right at 1, cannot choose.
    """

    judge: Judge
    requests: tuple[Request, ...]
    needs: str = LATENTS
    better: dict[str, str] = field(default_factory=lambda: dict.fromkeys(LOW, "low"))

    def score(self, samples: Samples) -> dict[str, float]:
        """Return all scores of `metrics.Scores` that are one number."""
        assert samples.latents is not None
        world = self.judge.world
        scores = self.judge.score(samples.latents.reshape(world.num_captions, -1, *world.shape))
        return {name: value for name, value in asdict(scores).items() if isinstance(value, float)}
