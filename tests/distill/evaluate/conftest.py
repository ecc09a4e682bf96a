"""Ground-truth clips of ShapeWorld, and the same after what compression and blur do to them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import ndimage

from distill.worlds.shapeworld.captions import sample_scene
from distill.worlds.shapeworld.law import Latent, sample_latent
from distill.worlds.shapeworld.render import render
from distill.worlds.shapeworld.schema import Scene


@dataclass(frozen=True)
class Example:
    scene: Scene
    latent: Latent
    clip: np.ndarray


def make_example(index: int) -> Example:
    """A random clip; splits and object counts in turn."""
    rng = np.random.default_rng([77, index])
    scene = sample_scene(rng, "train" if index % 2 else "held_out", 1 + (index // 2) % 2)
    latent = sample_latent(scene, rng)
    return Example(scene, latent, render(scene, latent))


def degrade(clip: np.ndarray, seed: int, noise: float = 4.0, blur_px: float = 0.6) -> np.ndarray:
    """Blur in space and add noise, both in 8-bit levels, as a compressed file does."""
    soft = ndimage.gaussian_filter(clip.astype(float), (0, blur_px, blur_px, 0))
    noisy = soft + np.random.default_rng(seed).normal(0.0, noise, clip.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return [make_example(index) for index in range(320)]


@pytest.fixture(scope="session")
def degraded() -> Callable[..., np.ndarray]:
    return degrade
