"""The analytic worlds by name: which factors they have, what ties them, and how many modes each caption keeps apart.

Legend: F frames, K components, N numbers of one sample, T factors.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from distill.worlds.analytic.world import HAAR, GaussianWorld, noise_covariance, pattern

SHAPE = (4, 8, 2, 2)


def ties() -> GaussianWorld:
    """Return four pairs of factors tied by a Gaussian copula, two of them unseen by channel means, and 8 modes.

    Growth and fade -.8; shade and background shade, radius and speed, the two offsets +.8. A mode is the signs of
    bend, turn and event; event is the product of the others in nine of ten samples. 8 captions, 64 components.
    """
    rng = torch.Generator().manual_seed(1)
    frames = torch.linspace(0, 1, SHAPE[1])
    one, ramp = torch.ones(SHAPE[1]), 2 * frames - 1
    bow, late = 1.3 * torch.sin(math.pi * frames), 1.5 * (frames > 0.55).float() - 0.5
    factors = {
        "growth": pattern(SHAPE, 0, 1.4 * ramp, 0),
        "fade": pattern(SHAPE, 1, 1.4 * ramp, 0),
        "shade": pattern(SHAPE, 3, 0.8 * one, 0),
        "background_shade": pattern(SHAPE, 2, 0.8 * one, 0),
        "radius": pattern(SHAPE, 2, 0.8 * one, 1),
        "speed": pattern(SHAPE, 3, 1.4 * ramp, 1),
        "offset1": pattern(SHAPE, 0, 0.8 * one, 2),
        "offset2": pattern(SHAPE, 1, 0.8 * one, 2),
        "bend": pattern(SHAPE, 3, bow, 3),
        "turn": pattern(SHAPE, 2, late, 3),
        "event": pattern(SHAPE, 0, late, 0),
    }
    patterns = torch.stack(list(factors.values()))
    rhos = {(0, 1): -0.8, (2, 3): 0.8, (4, 5): 0.8, (6, 7): 0.8}
    spreads = torch.tensor([0.6] * 8 + [0.15] * 3)  # the modes have little spread of their own
    covariance = _tied(patterns * spreads[:, None], rhos) + 0.25**2 * noise_covariance(SHAPE, 0.7)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    modes = 0.7 * signs @ patterns[8:]
    agreement = torch.where(signs[:, 2] == signs[:, 0] * signs[:, 1], 0.9, 0.1)
    num_captions = 8
    means, prior = [], torch.zeros(num_captions, 8 * num_captions, dtype=torch.float64)
    for caption in range(num_captions):
        middle = sum(
            0.5 * torch.randn(4, generator=rng)[:, None, None, None] * profile[:, None, None] * HAAR[cell]
            for profile, cell in ((one, 0), (ramp, 0), (one, 1), (one, 2))
        )
        assert isinstance(middle, Tensor)
        means.append(middle.flatten() + modes)
        positive = 0.3 + 0.4 * torch.rand(2, generator=rng)
        shares = torch.where(signs[:, :2] > 0, positive, 1 - positive).prod(dim=1) * agreement
        prior[caption, 8 * caption : 8 * caption + 8] = (shares / shares.sum()).double()
    return GaussianWorld(
        name="ties",
        shape=SHAPE,
        means=torch.cat(means),
        prior=prior / prior.sum(1, keepdim=True),
        covariance=covariance,
        mode_of=torch.arange(8).repeat(num_captions),
        patterns=patterns,
        ties=tuple(rhos),
    )


def orbit() -> GaussianWorld:
    """Return two planes in which every frame is a point on a circle, the speed of both tied, the phases free.

    No frame's margin knows the speed: the dependence is curved, and lies between frames. Plane 1 is channels 0 and 1
    of the means of cells, plane 2 channels 2 and 3 of their difference between columns. 6 captions, 504 components.
    """
    rng = torch.Generator().manual_seed(2)
    num_captions, num_phases, num_speeds = 6, 12, 7
    frames = torch.linspace(0, 1, SHAPE[1])
    means, owners, modes = [], [], []
    for caption in range(num_captions):
        middle = sum(
            0.35 * torch.randn(4, generator=rng)[:, None, None, None] * HAAR[cell].expand(SHAPE) for cell in (0, 2)
        )
        assert isinstance(middle, Tensor)
        centre = (0.5 + 0.5 * torch.rand(1, generator=rng).item()) * (1 if caption % 2 else -1)
        for speed in range(num_speeds):
            turns = math.pi * (centre + 0.5 * (2 * (speed + 0.5) / num_speeds - 1)) * frames
            for phase in range(num_phases):
                first = 2 * math.pi * phase / num_phases + turns
                second = 2 * math.pi * (phase / num_phases + caption / num_captions) - turns
                angles = ((first.cos(), 0), (first.sin(), 0), (second.cos(), 1), (second.sin(), 1))
                moving = [values[:, None, None] * HAAR[cell] for values, cell in angles]
                means.append((middle + torch.stack(moving)).flatten())
                owners.append(caption)
                modes.append(phase // 3 * num_speeds + speed)
    prior = torch.zeros(num_captions, len(means), dtype=torch.float64)
    prior[owners, torch.arange(len(means))] = 1.0 / (num_phases * num_speeds)
    one, ramp = torch.ones(SHAPE[1]), 2 * frames - 1
    patterns = torch.stack(
        [
            pattern(SHAPE, 0, 0.8 * ramp, 3),
            pattern(SHAPE, 2, 0.8 * ramp, 0),
            pattern(SHAPE, 1, 0.6 * one, 2),
            pattern(SHAPE, 3, 0.6 * one, 0),
        ]
    )
    rhos = {(0, 1): 0.8, (2, 3): -0.8}
    return GaussianWorld(
        name="orbit",
        shape=SHAPE,
        means=torch.stack(means),
        prior=prior,
        covariance=_tied(0.5 * patterns, rhos) + 0.15**2 * noise_covariance(SHAPE, 0.5),
        mode_of=torch.tensor(modes),
        patterns=patterns,
        ties=tuple(rhos),
    )


def switch(gap: float = 1.5) -> GaussianWorld:
    """Return three pairs of factors that are tied by modes alone: a student that loses modes loses the dependence.

    Three signs, each + in a share of samples that the caption gives; a sign moves two factors of different channels by
    `gap` to one side each, so far from the other side that nothing lies between. 8 captions, 64 components.

    After 500 updates dmd has .89 of the tied dependence (tau_kept, on both tuning seeds): here it is lost, where in
    `ties` it is overstated.
    """
    rng = torch.Generator().manual_seed(3)
    num_captions = 8
    frames = torch.linspace(0, 1, SHAPE[1])
    one, ramp = torch.ones(SHAPE[1]), 2 * frames - 1
    late = 1.5 * (frames > 0.55).float() - 0.5
    pairs = (((0, one, 0), (1, ramp, 0)), ((2, one, 1), (3, late, 1)), ((1, one, 2), (2, ramp, 2)))
    patterns = torch.stack([pattern(SHAPE, *part) for pair in pairs for part in pair])
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    modes = gap * signs.repeat_interleave(2, dim=1) @ patterns
    means, prior = [], torch.zeros(num_captions, 8 * num_captions, dtype=torch.float64)
    for caption in range(num_captions):
        middle = 0.5 * torch.randn(4, generator=rng)[:, None, None, None] * HAAR[3].expand(SHAPE)
        means.append(middle.flatten() + modes)
        positive = 0.2 + 0.6 * torch.rand(3, generator=rng)
        shares = torch.where(signs > 0, positive, 1 - positive).prod(dim=1)
        prior[caption, 8 * caption : 8 * caption + 8] = (shares / shares.sum()).double()
    return GaussianWorld(
        name="switch",
        shape=SHAPE,
        means=torch.cat(means),
        prior=prior / prior.sum(1, keepdim=True),
        covariance=_tied(0.15 * patterns, {}) + 0.25**2 * noise_covariance(SHAPE, 0.3),
        mode_of=torch.arange(8).repeat(num_captions),
        patterns=patterns,
        ties=((0, 1), (2, 3), (4, 5)),
    )


WORLDS: dict[str, Callable[[], GaussianWorld]] = {"ties": ties, "orbit": orbit, "switch": switch}


def make_world(name: str) -> GaussianWorld:
    """Return a world by its name.

    Raises:
        ConfigError: there is none of that name; the message lists all.
    """
    if name not in WORLDS:
        raise ConfigError(f"expected an analytic world, one of {', '.join(WORLDS)}, got {name!r}")
    return WORLDS[name]()


def _tied(scaled: Tensor, rhos: dict[tuple[int, int], float]) -> Tensor:
    """Return the (N, N) float64 covariance of factors along `scaled` (T, N) with these correlations."""
    correlations = torch.eye(len(scaled), dtype=torch.float64)
    for (first, second), rho in rhos.items():
        correlations[first, second] = correlations[second, first] = rho
    return scaled.double().T @ correlations @ scaled.double()
