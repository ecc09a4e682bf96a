"""A captioned Gaussian mixture over tiny latents: its law, its exact flow, and samples of it.

Knows no network and no training loop. Legend: B batch, K components, P captions, N numbers of one sample, T factors;
C channels, F frames, H, W rows and columns of the latents, N = C F H W.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS

# The level at which the component of a sample is read off: close to clean, above zero.
MODE_SIGMA = 0.02
LEAST_VARIANCE = 1e-8


@dataclass(frozen=True, kw_only=True)
class GaussianWorld:
    """x0 = means[k] + L xi with k ~ prior[caption], xi ~ N(0, 1) and one covariance L L^T for all components.

    Attributes:
        name: of the world.
        shape: (C, F, H, W) of a sample.
        means: (K, N) float32.
        prior: (P, K) float64, rows sum to 1; the law without caption is their mean.
        covariance: (N, N) float64, positive definite.
        mode_of: (K,) int64, the mode that a component belongs to.
        patterns: (T, N), directions of the factors; a factor is the projection of a sample.
        ties: pairs of factors that the law ties.
    """

    name: str
    shape: tuple[int, int, int, int]
    means: Tensor
    prior: Tensor
    covariance: Tensor
    mode_of: Tensor
    patterns: Tensor
    ties: tuple[tuple[int, int], ...]

    @property
    def num_captions(self) -> int:
        """Number of captions, P; caption P stands for none."""
        return self.prior.shape[0]

    def captions(self) -> list[str]:
        """Return the captions, "caption 0" and so on."""
        return [f"caption {index}" for index in range(self.num_captions)]

    @cached_property
    def log_prior(self) -> Tensor:
        """Return (P + 1, K) float32; the last row is the law without caption. -1e9 stands for impossible."""
        prior = torch.cat([self.prior, self.prior.mean(0, keepdim=True)])
        return prior.log().clamp_min(-1e9).float()

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.covariance)
        return values.float().clamp_min(LEAST_VARIANCE), vectors.float()

    @cached_property
    def _turned_means(self) -> Tensor:
        return self.means @ self._spectrum[1]

    def embeds(self, captions: Tensor) -> Tensor:
        """Return the one-hot embeddings of (B,) captions, (B, 1, P + 1)."""
        return torch.nn.functional.one_hot(captions, self.num_captions + 1).float()[:, None]

    def sample(self, captions: Tensor, rng: torch.Generator) -> Tensor:
        """Draw one sample of the law for each of (B,) captions, (B, C, F, H, W)."""
        components = torch.multinomial(self.log_prior.exp()[captions], 1, generator=rng)[:, 0]
        values, vectors = self._spectrum
        noise = torch.randn(len(captions), self.means.shape[1], generator=rng)
        return (self.means[components] + (noise * values.sqrt()) @ vectors.T).reshape(-1, *self.shape)

    def flow(self, latents: Tensor, sigma_B: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return E[noise - x0 | latents, caption], the flow that a perfect teacher predicts.

        With a = 1 - sigma, the eigenvalues lam of the covariance, s = a^2 lam + sigma^2 and y, nu_k in its
        eigenvectors: w_k = softmax(log prior + a <y / s, nu_k> - a^2 / 2 <1 / s, nu_k^2>), m = sum w_k nu_k,
        r = y - a m, E[x0] = m + a lam / s r, E[noise] = sigma r / s. No division by sigma.

        Args:
            latents: (B, C, F, H, W) at level sigma, x = (1 - sigma) x0 + sigma noise.
            sigma_B: (B,) in [0, 1].
            prompt_embeds: (B, 1, P + 1) of `embeds`.

        Returns:
            (B, C, F, H, W) float32.
        """
        sigma = sigma_B.float()[:, None]
        values, vectors = self._spectrum
        turned, spread, mean, _ = self._posterior(latents.flatten(1).float(), sigma, prompt_embeds[:, 0])
        rest = turned - (1.0 - sigma) * mean
        x0 = mean + (1.0 - sigma) * values / spread * rest
        return ((sigma * rest / spread - x0) @ vectors.T).reshape(latents.shape)

    def modes(self, x0: Tensor, caption: int) -> Tensor:
        """Return the mode of the nearest component of each sample of a caption, (B,) int64."""
        sigma = torch.full((len(x0), 1), MODE_SIGMA)
        embeds = self.embeds(torch.full((len(x0),), caption))[:, 0]
        weights = self._posterior((1.0 - MODE_SIGMA) * x0.flatten(1), sigma, embeds)[3]
        return self.mode_of[weights.argmax(dim=1)]

    def factors(self, x0: Tensor) -> Tensor:
        """Return the factors of samples, (B, T)."""
        return x0.flatten(1) @ (self.patterns / self.patterns.square().sum(1, keepdim=True)).T

    def _posterior(self, latents: Tensor, sigma: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y, s (both (B, N)), m (B, N) and w (B, K) of `flow`."""
        values, vectors = self._spectrum
        clean = 1.0 - sigma
        turned, spread = latents @ vectors, clean.square() * values + sigma.square()
        means = self._turned_means
        logits = embeds @ self.log_prior + clean * ((turned / spread) @ means.T)
        logits = logits - 0.5 * clean.square() * ((1.0 / spread) @ means.square().T)
        weights = logits.softmax(dim=1)
        return turned, spread, weights @ means, weights


class ExactTeacher(torch.nn.Module):
    """The flow of a world with the call of a Wan transformer; it has no parameters."""

    def __init__(self, world: GaussianWorld) -> None:
        super().__init__()
        self.world = world

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return (flow,) of latents (B, C, F, H, W) at timestep (B,) = 1000 sigma."""
        del return_dict
        return (self.world.flow(hidden_states, timestep / NUM_TRAIN_TIMESTEPS, encoder_hidden_states),)


HAAR = torch.tensor([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]).float()
"""(4, 2, 2): the mean of the cells, and their differences between columns, rows, and diagonals."""


def pattern(shape: tuple[int, int, int, int], channel: int, profile_F: Tensor, cell: int) -> Tensor:
    """Return a direction of latents, (N,): one channel, a profile over frames, a Haar pattern over the cells."""
    whole = torch.zeros(shape)
    whole[channel] = profile_F[:, None, None] * HAAR[cell]
    return whole.flatten()


def noise_covariance(shape: tuple[int, int, int, int], per_frame: float) -> Tensor:
    """Return the (N, N) float64 covariance of unit noise, correlated per_frame^|f - f'| over frames only."""
    num_channels, num_frames, height, width = shape
    frames = torch.arange(num_frames)
    over_frames = per_frame ** (frames[:, None] - frames[None]).abs().double()
    parts = (torch.eye(num_channels).double(), over_frames, torch.eye(height * width).double())
    size = math.prod(shape)
    return torch.einsum("ab,fg,hk->afhbgk", *parts).reshape(size, size)
