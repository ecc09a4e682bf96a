"""How far samples are from a reference of the same captions: margins, dependence, modes and the joint law, apart.

Legend: P captions, S samples of one caption, V Haar coefficients of a sample, T factors; C channels, F frames.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distill.worlds.analytic.world import HAAR, GaussianWorld

NUM_DIRECTIONS = 12
NUM_ENERGY, NUM_TAU = 400, 512
STRONG, MISSED = 0.2, 0.25
_QUANTILES = (torch.arange(64) + 0.5) / 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Distances of samples to a reference, means over captions; 0 is right unless said otherwise.

    Attributes:
        tau_err: mean error of Kendall's tau of the tied factors.
        taus: Kendall's tau of each tied pair.
        tau_kept: regression slope of these on the reference's; 1 is right, below it dependence is lost.
        frame_rho: mean error of Spearman's correlation between frames of one channel and Haar pattern.
        cross_rho: the same between different channels or patterns.
        kept: regression slope of the samples' correlations on the reference's, over pairs that are strong there; 1 is
            right, below it dependence is lost, above it overstated.
        w1: mean Wasserstein distance of the Haar coefficients, in units of the reference's standard deviation.
        sd_ratio: mean ratio of their standard deviations; 1 is right.
        energy: energy distance along the main directions, whitened; a proper score of the joint law there.
        mode_tv: total variation of the modes.
        mode_miss: mass of modes that have less than a quarter of their share.
    """

    tau_err: float
    taus: tuple[float, ...]
    tau_kept: float
    frame_rho: float
    cross_rho: float
    kept: float
    w1: float
    sd_ratio: float
    energy: float
    mode_tv: float
    mode_miss: float


@dataclass(frozen=True)
class Judge:
    """Scores samples against a reference.

    Attributes:
        world: gives factors and modes.
        reference: (P, S, C, F, H, W), samples of the law, or of the guided teacher.
    """

    world: GaussianWorld
    reference: Tensor

    def score(self, samples: Tensor) -> Scores:
        """Return the scores of samples, (P, S, C, F, H, W)."""
        rho, taus = self._dependence(samples)
        rho_wanted, taus_wanted = self._wanted
        error = (rho - rho_wanted).abs()
        num_blocks, num_frames = 4 * self.world.shape[0], self.world.shape[1]
        block = torch.arange(num_blocks).repeat_interleave(num_frames)
        same = block[:, None] == block
        upper = torch.ones_like(same).triu(1)
        strong = (rho_wanted.abs() > STRONG) & upper
        per_caption = torch.tensor(
            [self._of_caption(caption, own) for caption, own in enumerate(samples)], dtype=torch.float64
        ).mean(0)
        w1, sd_ratio, energy, mode_tv, mode_miss = per_caption.tolist()
        return Scores(
            tau_err=float((taus - taus_wanted).abs().mean()),
            taus=tuple(taus.tolist()),
            tau_kept=float((taus * taus_wanted).sum() / taus_wanted.square().sum()),
            frame_rho=float(error[same & upper].mean()),
            cross_rho=float(error[~same & upper].mean()),
            kept=float((rho * rho_wanted)[strong].sum() / rho_wanted[strong].square().sum()),
            w1=w1,
            sd_ratio=sd_ratio,
            energy=energy,
            mode_tv=mode_tv,
            mode_miss=mode_miss,
        )

    def matrices(self, samples: Tensor) -> dict[str, Tensor]:
        """Return the dependence within samples (P, S, C, F, H, W), means over captions.

        Returns:
            tau, (T, T): Kendall's, between all factors. rho, (F, F): Spearman's between frames, mean over channels and
            Haar patterns.
        """
        tau = torch.stack([kendall_matrix(self.world.factors(own[:NUM_TAU])) for own in samples]).mean(0)
        frames = samples.shape[3]
        whole = torch.stack([spearman(haar_coefficients(own)) for own in samples]).mean(0)
        blocks = whole.reshape(-1, frames, len(whole) // frames, frames)
        return {"tau": tau, "rho": blocks.diagonal(dim1=0, dim2=2).mean(-1)}

    @cached_property
    def _wanted(self) -> tuple[Tensor, Tensor]:
        return self._dependence(self.reference)

    @cached_property
    def _directions(self) -> Tensor:
        """Return the main directions of the reference within captions, whitened, (N, NUM_DIRECTIONS)."""
        centred = (self.reference - self.reference.mean(1, keepdim=True)).flatten(2).flatten(0, 1)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        directions: Tensor = vectors[:, -NUM_DIRECTIONS:] / values[-NUM_DIRECTIONS:].sqrt()
        return directions

    def _dependence(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return Spearman's matrix (V, V) and Kendall's tau of each tied pair, means over captions."""
        rho = torch.stack([spearman(haar_coefficients(own)) for own in samples]).mean(0)
        taus = []
        for own in samples:
            factors = self.world.factors(own[:NUM_TAU])
            taus.append(torch.tensor([kendall(factors[:, i], factors[:, j]) for i, j in self.world.ties]))
        return rho, torch.stack(taus).mean(0)

    def _of_caption(self, caption: int, samples: Tensor) -> tuple[float, float, float, float, float]:
        reference = self.reference[caption]
        own, wanted = haar_coefficients(samples), haar_coefficients(reference)
        spread = wanted.std(0)
        shift = (own.quantile(_QUANTILES, 0) - wanted.quantile(_QUANTILES, 0)).abs().mean(0) / spread
        main = [batch.flatten(1)[:NUM_ENERGY] @ self._directions for batch in (samples, reference)]
        num_modes = int(self.world.mode_of.max()) + 1
        shares = [
            torch.bincount(self.world.modes(batch, caption), minlength=num_modes) / len(batch)
            for batch in (samples, reference)
        ]
        return (
            float(shift.mean()),
            float((own.std(0) / spread).mean()),
            energy_distance(*main),
            float(0.5 * (shares[0] - shares[1]).abs().sum()),
            float(shares[1][shares[0] < MISSED * shares[1]].sum()),
        )


def haar_coefficients(samples: Tensor) -> Tensor:
    """Return (S, V) of samples (S, C, F, 2, 2), ordered by channel, Haar pattern, frame."""
    return torch.einsum("scfhw,khw->sckf", samples, HAAR).flatten(1) / 4


def spearman(values: Tensor) -> Tensor:
    """Return Spearman's correlations of the columns of (S, V), (V, V)."""
    ranks = values.argsort(0).argsort(0).float()
    ranks = ranks - ranks.mean(0)
    correlations: Tensor = (ranks / ranks.norm(dim=0)).T @ (ranks / ranks.norm(dim=0))
    return correlations


def kendall(first: Tensor, second: Tensor) -> float:
    """Return Kendall's tau of two (S,) tensors without equal values."""
    signs = (first[:, None] - first).sign() * (second[:, None] - second).sign()
    return float(signs.sum() / (len(first) * (len(first) - 1)))


def kendall_matrix(values: Tensor) -> Tensor:
    """Return Kendall's tau between the columns of (S, T), (T, T), where no column has equal values."""
    count = len(values)
    signs = (values[:, None] - values).sign().flatten(0, 1)
    return signs.T @ signs / (count * (count - 1))


def energy_distance(first: Tensor, second: Tensor) -> float:
    """Return the unbiased energy distance of two samples, (S, D) and (S', D); around 0 for one law, also below."""
    within = [torch.cdist(own, own).sum() / (len(own) * (len(own) - 1)) for own in (first, second)]
    return float(2 * torch.cdist(first, second).mean() - within[0] - within[1])


def copying(student: Tensor, teacher: Tensor) -> float:
    """Return the mean correlation of what student and teacher make of the same noise, within captions.

    Args:
        student, teacher: (P, S, C, F, H, W); sample s of both began with the same noise.

    Returns:
        1 where the student repeats the teacher's own pairing of noise and sample, 0 where it pairs them freely or
        makes one sample of all noise.
    """
    own, other = [(batch - batch.mean(1, keepdim=True)).flatten(2) for batch in (student, teacher)]
    sizes = (own.square().sum((1, 2)) * other.square().sum((1, 2))).sqrt()
    # A student that makes one sample of all noise copies nothing.
    return float(((own * other).sum((1, 2)) / sizes.clamp_min(1e-30)).mean())
