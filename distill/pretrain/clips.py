"""Training clips by index: caption, pixels, and where the objects are; numpy only, so that workers start fast.

Legend: T frames, H rows, W columns, K points.
"""

from dataclasses import dataclass

import numpy as np

from distill.worlds.shapeworld.captions import TWO_OBJECT_SHARE, canonical_caption, free_caption, sample_scene
from distill.worlds.shapeworld.law import sample_latent
from distill.worlds.shapeworld.render import render
from distill.worlds.shapeworld.schema import (
    NATIVE_HEIGHT,
    NATIVE_NUM_FRAMES,
    NATIVE_WIDTH,
    Scene,
)

FREE_SHARE = 0.6
POINTS_PER_CLIP = 16
CLIP_SHAPE = (NATIVE_NUM_FRAMES, NATIVE_HEIGHT, NATIVE_WIDTH, 3)
BITS_SHAPE = (NATIVE_NUM_FRAMES, NATIVE_HEIGHT, NATIVE_WIDTH // 8)


@dataclass(frozen=True, slots=True)
class RenderedClip:
    """One training clip.

    Attributes:
        caption: that it shows.
        pixels: uint8 (T, H, W, 3).
        object_bits: uint8 (T, H, W / 8), one bit per pixel that an object covers, as np.packbits gives them.
        points: int16 (K, 3), random object pixels as (frame, row, column).
    """

    caption: str
    pixels: np.ndarray
    object_bits: np.ndarray
    points: np.ndarray


@dataclass(frozen=True, slots=True)
class ClipSource:
    """The training clips of one run: clip `index` is the same for the same source.

    Attributes:
        seed: of captions and pixels.
        two_object_share: probability that a clip shows two objects.
    """

    seed: int
    two_object_share: float = TWO_OBJECT_SHARE

    def draw(self, index: int) -> tuple[str, Scene, np.random.Generator]:
        """Caption and scene of clip `index`, and the generator that goes on to draw its pixels."""
        rng = np.random.default_rng([self.seed, 3, index])
        scene = sample_scene(rng, two_object_share=self.two_object_share)
        caption = free_caption(scene, rng) if rng.random() < FREE_SHARE else canonical_caption(scene)
        return caption, scene, rng

    def render(self, index: int) -> RenderedClip:
        """Draw and render clip `index`."""
        caption, scene, rng = self.draw(index)
        latent = sample_latent(scene, rng)
        is_object = np.zeros(CLIP_SHAPE[:3], dtype=bool)
        pixels = render(scene, latent, covered=is_object)
        return RenderedClip(caption, pixels, np.packbits(is_object, axis=-1), _choose_points(is_object, rng))

    def captions(self, num_clips: int) -> list[str]:
        """Captions of the first clips, without rendering them."""
        return [self.draw(index)[0] for index in range(num_clips)]


def _choose_points(is_object: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return int16 (K, 3) random True positions of (T, H, W); every frame has some, because objects never leave."""
    flat = np.flatnonzero(is_object)
    chosen = flat[rng.integers(len(flat), size=POINTS_PER_CLIP)]
    return np.stack(np.unravel_index(chosen, is_object.shape), axis=1).astype(np.int16)
