"""Scene and latent to pixels: antialiased, deterministic, at any size that is a multiple of 16.

Knows the schema and the law; knows nothing of captions or networks.
"""

from __future__ import annotations

import numpy as np

from codmd_serve.errors import ConfigError
from distill.worlds.shapeworld.law import Latent, displacement, sample_latent
from distill.worlds.shapeworld.schema import (
    BACKGROUNDS,
    COLOURS,
    NATIVE_HEIGHT,
    NATIVE_NUM_FRAMES,
    NATIVE_WIDTH,
    WORLD_SIZE,
    Scene,
)

HORIZON_LIFT = 18.0
"""8-bit levels by which the background below the horizon is lighter, before background_shade."""
SQUARE_HALF, TRIANGLE_RADIUS, CROSS_ARM, CROSS_HALF, RING_OUTER, RING_INNER = 0.9, 1.25, 1.1, 0.4, 1.1, 0.6
AREA = {
    "circle": np.pi,
    "square": 4 * SQUARE_HALF**2,
    "triangle": 3 * np.sqrt(3) / 4 * TRIANGLE_RADIUS**2,
    "cross": 4 * CROSS_HALF * (2 * CROSS_ARM - CROSS_HALF),
    "ring": np.pi * (RING_OUTER**2 - RING_INNER**2),
}
"""Area of a shape of radius 1."""


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray, px_per_unit: float) -> np.ndarray:
    """Return the share in [0, 1] of each pixel that a shape covers.

    Args:
        shape: one of SHAPES.
        dx, dy: offsets of the pixel centres from the shape's centre in world units, broadcastable together.
        radius: in world units, broadcastable.
        px_per_unit: pixels per world unit; the edge ramp is one pixel wide.
    """
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - radius
    elif shape == "ring":
        middle, half = (RING_OUTER + RING_INNER) / 2, (RING_OUTER - RING_INNER) / 2
        distance = np.abs(np.sqrt(dx * dx + dy * dy) - middle * radius) - half * radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - SQUARE_HALF * radius
    elif shape == "cross":
        ax, ay = np.abs(dx), np.abs(dy)
        horizontal = np.maximum(ax - CROSS_ARM * radius, ay - CROSS_HALF * radius)
        vertical = np.maximum(ay - CROSS_ARM * radius, ax - CROSS_HALF * radius)
        distance = np.minimum(horizontal, vertical)
    else:
        inner = TRIANGLE_RADIUS / 2 * radius
        side = np.float32(np.sqrt(3) / 2) * np.abs(dx) - 0.5 * dy
        distance = np.maximum(side, dy + 0 * dx) - inner
    share: np.ndarray = np.clip(0.5 - distance * px_per_unit, 0.0, 1.0)
    return share


def render(
    scene: Scene,
    latent: Latent,
    height: int = NATIVE_HEIGHT,
    width: int = NATIVE_WIDTH,
    num_frames: int = NATIVE_NUM_FRAMES,
) -> np.ndarray:
    """Render one clip.

    Returns:
        uint8 array (num_frames, height, width, 3), RGB.

    Raises:
        ConfigError: when a size is not a positive multiple of 16 or num_frames is below 1.
    """
    check_size(height, width, num_frames)
    scale = min(height, width) / WORLD_SIZE
    tau = np.linspace(0.0, 1.0, num_frames) if num_frames > 1 else np.zeros(1)
    path = displacement(scene, latent, tau)
    ys = ((np.arange(height) + 0.5) / scale).astype(np.float32)
    xs = ((np.arange(width) + 0.5) / scale).astype(np.float32)
    background = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    below = np.clip(0.5 + (ys - latent.horizon) * scale, 0.0, 1.0)[:, None]
    rows = (background + HORIZON_LIFT * below) * np.float32(latent.background_shade)
    frames = np.empty((num_frames, height, width, 3), dtype=np.float32)
    frames[:] = rows[None, :, None, :]
    for index, (colour, shape) in enumerate(scene.objects):
        centre = np.asarray(latent.start[index]) + path
        radius = (latent.radius[index] * (1.0 + latent.growth * tau)).astype(np.float32)[:, None, None]
        dx = (xs[None, :] - centre[:, :1]).astype(np.float32)[:, None, :]
        dy = (ys[None, :] - centre[:, 1:]).astype(np.float32)[:, :, None]
        alpha = coverage(shape, dx, dy, radius, scale)[..., None]
        light = (latent.shade[index] * (1.0 - latent.fade * tau)).astype(np.float32)[:, None]
        paint = np.array(COLOURS[colour], dtype=np.float32)[None] * light
        frames += alpha * (paint[:, None, None, :] - frames)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def sample_clip(
    scene: Scene,
    rng: np.random.Generator,
    height: int = NATIVE_HEIGHT,
    width: int = NATIVE_WIDTH,
    num_frames: int = NATIVE_NUM_FRAMES,
) -> np.ndarray:
    """Draw a latent from the law of `scene` and render it: uint8 (num_frames, height, width, 3)."""
    check_size(height, width, num_frames)
    scale = min(height, width) / WORLD_SIZE
    return render(scene, sample_latent(scene, rng, width / scale, height / scale), height, width, num_frames)


def check_size(height: int, width: int, num_frames: int) -> None:
    """Raise ConfigError unless both sizes are positive multiples of 16 and there is at least one frame."""
    if height < 16 or width < 16 or height % 16 or width % 16:
        raise ConfigError(f"height and width: expected positive multiples of 16, got {height}x{width}")
    if num_frames < 1:
        raise ConfigError(f"num_frames: expected at least 1, got {num_frames}")
