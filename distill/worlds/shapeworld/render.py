"""Renders a scene and latent to pixels: antialiased, deterministic, at any multiple of 16.

Knows the schema and the law; knows nothing of captions or networks.
"""

from __future__ import annotations

import numpy as np

from codmd_serve.errors import ConfigError
from distill.worlds.shapeworld.law import EXTENT, Latent, displacement, sample_latent
from distill.worlds.shapeworld.schema import (
    BACKGROUNDS,
    COLOURS,
    NATIVE_HEIGHT,
    NATIVE_NUM_FRAMES,
    NATIVE_WIDTH,
    WORLD_SIZE,
    Scene,
)

HORIZON_LIFT = 26.0
"""8-bit levels by which the floor, the background below the horizon, is lighter, before background_shade."""
SKY_GRADIENT, FLOOR_GRADIENT = 9.0, 8.0
"""8-bit levels by which each part of the background gains from its top to its bottom, before background_shade."""
VOLUME, LIGHT_X, LIGHT_Y = 0.14, 0.2, 0.45
"""Shapes are lit from the upper left: the far side is darker by up to VOLUME; the slopes are per radius."""
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


def volume(dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return the shading in [1 - VOLUME, 1] of a shape's pixels, lit from the upper left.

    Args:
        dx, dy, radius: as for `coverage`.
    """
    towards = 0.5 + (LIGHT_Y * dy + LIGHT_X * dx) / radius
    factor: np.ndarray = 1.0 - VOLUME * np.clip(towards, 0.0, 1.0)
    return factor


def background_levels(horizon_px: float, height: int) -> np.ndarray:
    """Return by how many levels each row, (height,), is lighter than the background's colour, at shade 1.

    Args:
        horizon_px: row coordinate of the line between sky and floor; `height` or more draws no floor.
        height: rows of the frame; the ramp at the horizon is one pixel wide.
    """
    ys = np.arange(height) + 0.5
    is_floor = np.clip(0.5 + ys - horizon_px, 0.0, 1.0)
    sky = SKY_GRADIENT * (ys / max(horizon_px, 1.0) - 0.5)
    floor = HORIZON_LIFT + FLOOR_GRADIENT * ((ys - horizon_px) / max(height - horizon_px, 1.0) - 0.5)
    levels: np.ndarray = (1.0 - is_floor) * sky + is_floor * floor
    return levels


def background_rows(name: str, horizon_px: float, shade: float, height: int) -> np.ndarray:
    """Return the colour of every row, float32 (height, 3).

    Args:
        name: one of BACKGROUNDS.
        horizon_px, height: as for `background_levels`.
        shade: brightness factor.
    """
    rows: np.ndarray = (np.array(BACKGROUNDS[name]) + background_levels(horizon_px, height)[:, None]) * shade
    return rows.astype(np.float32)


def paint(
    frames: np.ndarray,
    shape: str,
    colour: np.ndarray,
    centre: np.ndarray,
    radius: np.ndarray,
    light: np.ndarray,
    covered: np.ndarray | None = None,
) -> None:
    """Paint one lit object over frames, in place; shared by the renderer and the scores that render detections.

    Args:
        frames: uint8 (T, H, W, 3).
        shape: one of SHAPES.
        colour: (3,), 8-bit RGB.
        centre: (T, 2), x and y in pixels from the top left corner.
        radius: (T,), pixels.
        light: (T,), brightness factor of the colour.
        covered: bool (T, H, W); where given, set to True in every pixel that the object touches.
    """
    windows, dx, dy = frame_windows(centre, EXTENT[shape] * float(radius.max(initial=0.0)) + 1.0, *frames.shape[1:3])
    size = np.maximum(radius, 1e-3).astype(np.float32)[:, None, None]
    share = coverage(shape, dx, dy, size, 1.0)
    lit = volume(dx, dy, size) * light.astype(np.float32)[:, None, None]
    patches = np.stack([frames[window] for window in windows]).astype(np.float32)
    for channel, level in enumerate(np.asarray(colour, dtype=np.float32)):
        patches[..., channel] += share * (lit * level - patches[..., channel])
    painted = np.clip(np.rint(patches), 0, 255).astype(np.uint8)
    touched = share > 0.0
    for frame, window in enumerate(windows):
        frames[window] = painted[frame]
        if covered is not None:
            covered[window] |= touched[frame]


def frame_windows(
    centre: np.ndarray, reach: float, height: int, width: int
) -> tuple[list[tuple[int, slice, slice]], np.ndarray, np.ndarray]:
    """Crop a window of one size around a centre from every frame, shifted inside the frame near its edges.

    Args:
        centre: (T, 2), x and y in pixels.
        reach: pixels that the window shows to every side of the centre.
        height, width: of the frames.

    Returns:
        Index of each window into an array (T, H, W, ...), and the offsets of its pixel centres from the centre, float32
        (T, 1, Q) and (T, P, 1).
    """
    side = 2 * int(np.ceil(reach)) + 1
    rows, columns = min(side, height), min(side, width)
    left = np.clip(np.floor(centre[:, 0]).astype(int) - side // 2, 0, width - columns)
    top = np.clip(np.floor(centre[:, 1]).astype(int) - side // 2, 0, height - rows)
    windows = [(t, slice(y, y + rows), slice(x, x + columns)) for t, (y, x) in enumerate(zip(top, left, strict=True))]
    dx = (left - centre[:, 0] + 0.5).astype(np.float32)[:, None, None] + np.arange(columns, dtype=np.float32)
    dy = (top - centre[:, 1] + 0.5).astype(np.float32)[:, None, None] + np.arange(rows, dtype=np.float32)[:, None]
    return windows, dx, dy


def render(
    scene: Scene,
    latent: Latent,
    height: int = NATIVE_HEIGHT,
    width: int = NATIVE_WIDTH,
    num_frames: int = NATIVE_NUM_FRAMES,
    covered: np.ndarray | None = None,
) -> np.ndarray:
    """Render one clip.

    Args:
        scene, latent: what is shown.
        height, width: pixels, multiples of 16.
        num_frames: over the whole clip; fewer frames show the same motion in larger steps.
        covered: bool (num_frames, height, width); where given, set to True in every pixel that an object touches.

    Returns:
        uint8 array (num_frames, height, width, 3), RGB.

    Raises:
        ConfigError: when a size is not a positive multiple of 16 or num_frames is below 1.
    """
    check_size(height, width, num_frames)
    scale = min(height, width) / WORLD_SIZE
    tau = np.linspace(0.0, 1.0, num_frames) if num_frames > 1 else np.zeros(1)
    rows = background_rows(scene.background, latent.horizon * scale, latent.background_shade, height)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    frames[:] = np.repeat(np.clip(np.rint(rows), 0, 255).astype(np.uint8)[:, None, :], width, axis=1)
    for index, (colour, shape) in enumerate(scene.objects):
        centre = (np.asarray(latent.start[index]) + displacement(scene, latent, tau, index)) * scale
        radius = latent.radius[index] * (1.0 + latent.growth * tau) * scale
        light = latent.shade[index] * (1.0 - latent.fade * tau)
        paint(frames, shape, np.array(COLOURS[colour]), centre, radius, light, covered)
    return frames


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
