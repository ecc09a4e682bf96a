"""Samples of a world: of its law, of its exact teacher, of a student; the states after every step are kept.

Legend: P captions, S samples of one caption, K steps; C channels, F frames, H, W rows and columns.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from codmd_serve.sampler import rollout
from codmd_serve.schedule import shift_sigma
from distill.worlds.analytic.world import GaussianWorld

# (latents, timestep_B, embeds) -> flow
Flow = Callable[[Tensor, Tensor, Tensor], Tensor]
SHIFT = 3.0
CHUNK = 1024


def captions_of(world: GaussianWorld, num_samples: int) -> Tensor:
    """Return every caption num_samples times, (P * S,)."""
    return torch.arange(world.num_captions).repeat_interleave(num_samples)


def initial_noise(world: GaussianWorld, num_samples: int, num_steps: int, seed: int) -> Tensor:
    """Draw the noise of all steps, (K, P, S, C, F, H, W); that of the first step is the same for any K."""
    shape = (world.num_captions, num_samples, *world.shape)
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=rng) for _ in range(num_steps)])


def law_samples(world: GaussianWorld, num_samples: int, seed: int) -> Tensor:
    """Draw from the law itself, (P, S, C, F, H, W)."""
    drawn = world.sample(captions_of(world, num_samples), torch.Generator().manual_seed(seed))
    return drawn.reshape(world.num_captions, num_samples, *world.shape)


@torch.no_grad()
def teacher_samples(world: GaussianWorld, noise: Tensor, guidance_scale: float, num_steps: int) -> list[Tensor]:
    """Follow the guided exact flow from noise (P, S, C, F, H, W) by Euler steps at levels of shift 3.

    Returns:
        After each step, the clean prediction, (P, S, C, F, H, W); that of the last step is where the path ends.
    """
    levels = [shift_sigma(1 - step / num_steps, SHIFT) for step in range(num_steps + 1)]
    embeds = world.embeds(captions_of(world, noise.shape[1]))
    free = world.embeds(torch.full((1,), world.num_captions))
    parts = []
    whole = noise.flatten(0, 1)
    for first in range(0, len(whole), CHUNK):
        latents, own = whole[first : first + CHUNK], embeds[first : first + CHUNK]
        predictions = []
        for sigma, lower in pairwise(levels):
            sigma_B = torch.full((len(latents),), sigma)
            flow = world.flow(latents, sigma_B, own)
            if guidance_scale != 1.0:
                unguided = world.flow(latents, sigma_B, free.expand_as(own))
                flow = unguided + guidance_scale * (flow - unguided)
            predictions.append(latents - sigma * flow)
            latents = latents + (lower - sigma) * flow
        parts.append(predictions)
    return [torch.cat(step).reshape(noise.shape) for step in zip(*parts, strict=True)]


@torch.no_grad()
def student_samples(
    world: GaussianWorld,
    flow: Flow,
    noise: Tensor,
    sigmas: Sequence[float],
    timesteps: Sequence[float],
    sampler: str,
) -> list[Tensor]:
    """Sample a student by the served sampler.

    Args:
        world: whose captions.
        flow: of the student.
        noise: (K, P, S, C, F, H, W).
        sigmas, timesteps, sampler: its steps, as in student.json.

    Returns:
        After each step, the clean prediction, (P, S, C, F, H, W).
    """
    predictions: list[Tensor] = []
    rollout(
        flow,
        noise.flatten(1, 2),
        world.embeds(captions_of(world, noise.shape[2])),
        sigmas,
        timesteps,
        sampler=sampler,
        on_step=lambda _index, x0: predictions.append(x0.reshape(noise.shape[1:])),
    )
    return predictions
