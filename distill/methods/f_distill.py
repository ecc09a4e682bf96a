"""f-distill: distribution matching by another f-divergence, as a weight for each sample from the discriminator.

Owns its settings and the running means that normalise the weights. Draws no random number.

Legend: B samples of the whole batch, K bins of noise levels.
"""

from dataclasses import dataclass

from torch import Tensor

from codmd_serve.errors import ConfigError
from distill.losses.divergence import (
    DIVERGENCES,
    binned_means,
    density_ratio,
    level_bins,
    normalised_weights,
)
from distill.settings import check_choice, check_range

NO_DIVERGENCE = "none"
# Name of its running means in `Turn.memory`.
RATIO_MEANS = "ratio_means"


@dataclass(frozen=True, kw_only=True, slots=True)
class FDistillConfig:
    """The weight of each sample's direction: h(r) = f''(r) * r^2, with r the discriminator's ratio of densities.

    Attributes:
        divergence: `none`, `reverse_kl` (h = 1: DMD), `js` (h = r / (1 + r)) or `forward_kl` (h = r).
        ratio_min, ratio_max: bounds of r.
        bins: of noise levels, in each of which r is divided by its mean.
        ratio_decay: share of that mean that stays at each student update; 0 takes the batch's own.
    """

    divergence: str = NO_DIVERGENCE
    ratio_min: float = 0.1
    ratio_max: float = 20.0
    bins: int = 10
    ratio_decay: float = 0.5

    def __post_init__(self) -> None:
        check_choice("terms.f_distill.divergence", self.divergence, (NO_DIVERGENCE, *DIVERGENCES))
        check_range("terms.f_distill.ratio_min", self.ratio_min, 1e-6, 1.0)
        check_range("terms.f_distill.ratio_max", self.ratio_max, 1.0, 1e6)
        check_range("terms.f_distill.bins", self.bins, 1, 1000)
        check_range("terms.f_distill.ratio_decay", self.ratio_decay, 0.0, 0.99999)

    @property
    def is_on(self) -> bool:
        """Whether samples are weighted."""
        return self.divergence != NO_DIVERGENCE

    def check_discriminator(self, *, is_there: bool, shares_noise: bool) -> None:
        """Refuse weights without a ratio.

        Raises:
            ConfigError: names the key.
        """
        if self.is_on and not is_there:
            raise ConfigError(
                f"terms.f_distill.divergence {self.divergence} needs terms.gan.critic_weight above 0: "
                "the ratio of densities is the discriminator's"
            )
        if self.is_on and not shares_noise:
            raise ConfigError(
                f"terms.f_distill.divergence {self.divergence} needs terms.gan.shares_noise true: the ratio is wanted "
                "at the state that is scored"
            )


def sample_weights(logits_B: Tensor, sigma_B: Tensor, settings: FDistillConfig, means_K: Tensor) -> Tensor:
    """Return the weights of a whole batch and move the running means, in place.

    Args:
        logits_B: of the discriminator on the student's samples, in the noise of their scores.
        sigma_B: noise level of each.
        settings: with a divergence.
        means_K: float32.

    Returns:
        (B,) float32 with mean 1, without gradient. A sample without a finite logit counts as one that cannot be told
        from real.
    """
    ratio_B = density_ratio(logits_B.nan_to_num(), settings.ratio_min, settings.ratio_max)
    bin_B = level_bins(sigma_B, settings.bins)
    means_K.copy_(binned_means(ratio_B, bin_B, means_K, settings.ratio_decay))
    return normalised_weights(ratio_B, bin_B, means_K, settings.divergence)
