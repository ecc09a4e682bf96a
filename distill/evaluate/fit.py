"""One object over time: which shape of the world, where, how large and how bright, by fitting renders to pixels.

Knows nothing of captions or of how the object's pixels were found.

Legend: N frames the object was seen in, P patch rows and columns, R candidate radii. Lengths are pixels.

A pixel of coverage m over the background b shows (1 - m) * b + m * v * light * c, c being a palette colour and v the
world's shading of the shape. For a given m and v the best light is linear least squares, so a candidate (shape, radius)
costs a few sums over its patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.evaluate.background import UNCLEAR
from distill.worlds.shapeworld.render import AREA, coverage, volume
from distill.worlds.shapeworld.schema import COLOURS, SHAPES

_SHAPE_FRAMES = 4
_SHAPE_FACTORS = np.array([0.82, 0.91, 1.0, 1.1], dtype=np.float32)
_RADIUS_FACTORS = np.array([0.9, 0.95, 1.0, 1.05, 1.1], dtype=np.float32)
_BLURS_PX = (0.0, 1.2, 0.7, 2.0)
"""Gaussian blurs of the render that are tried, the first two for every shape. Without them a blurred thin shape reads
as dark, a small ring as a disc and a triangle, its corners gone, as a circle."""
_MIN_FIT = 0.5
_MARGIN_PX = 3
_MAX_REACH = 0.4
"""Half a patch at most, of a frame's short side; the world's largest object reaches 0.33."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """An object in the N frames it was seen in.

    Attributes:
        shape: one of SHAPES, or "unclear" when the best explains less than half of the object's energy.
        centre: float (N, 2), x and y in pixels from the top left corner of the frame.
        radius: float (N,), pixels.
        light: float (N,), brightness factor of the palette colour.
        paint: float (3,), colour over all frames, not bound to the palette, 8-bit levels.
        explained: share in [0, 1] of the energy about the background that the fit explains.
    """

    shape: str
    centre: np.ndarray
    radius: np.ndarray
    light: np.ndarray
    paint: np.ndarray
    explained: float


@dataclass(frozen=True, slots=True, eq=False)
class _Patches:
    """Sums over channels that every candidate shares, in patches around the object: (N, P, P), or (N, P, 1)."""

    ys: np.ndarray
    xs: np.ndarray
    weight: np.ndarray
    region: np.ndarray
    own: np.ndarray
    above: np.ndarray
    energy: np.ndarray
    dot_colour: np.ndarray
    dot_row: np.ndarray
    row_row: np.ndarray
    row_colour: np.ndarray
    rows: np.ndarray
    by_pixel: np.ndarray  # (N, P * P, 5): factors of m, m * m, m * v, m * m * v and (m * v) ** 2 in a candidate's sums
    colour_energy: float


def widen(mask: np.ndarray, num_px: int) -> np.ndarray:
    """Grow a mask, bool (N, P, Q), by `num_px` pixels to every side and corner of each frame."""
    for axis in (1, 2):
        for _ in range(num_px):
            grown = mask.copy()
            here, there = [slice(None)] * 3, [slice(None)] * 3
            here[axis], there[axis] = slice(1, None), slice(None, -1)
            grown[tuple(here)] |= mask[tuple(there)]
            grown[tuple(there)] |= mask[tuple(here)]
            mask = grown
    return mask


def fit_object(
    above_background: np.ndarray,
    rows: np.ndarray,
    owner: np.ndarray,
    frames: np.ndarray,
    parts: np.ndarray,
    boxes: np.ndarray,
    colour: str,
) -> Fit:
    """Fit one object in all frames it was seen in.

    Args:
        above_background: float32 (T, H, W, 3), pixels less background, 8-bit levels.
        rows: float32 (H, 3), background.
        owner: int (T, H, W), 0 for background, else the part a pixel belongs to.
        frames: int (N,), frame of each part.
        parts: int (N,), the object's part in that frame.
        boxes: int (N, 4), y0, y1, x0, x1 of each part, ends excluded.
        colour: one of COLOURS.
    """
    patches = _cut(above_background, rows, owner, frames, parts, boxes, np.array(COLOURS[colour], dtype=np.float32))
    centre, area = _centre_and_area(patches)
    picks = np.unique(np.linspace(0, len(frames) - 1, min(_SHAPE_FRAMES, len(frames))).round().astype(int))
    shape, factor, blur_px = _choose_shape(_take(patches, picks), centre[picks], area[picks])
    radius = _refine_radius(patches, shape, centre, np.sqrt(area / AREA[shape]) * factor, blur_px)
    residual, light, cover, lit = _residual(patches, shape, centre, radius[:, None], blur_px)
    energy = float((patches.energy * patches.weight).sum())
    explained = max(0.0, 1.0 - float(residual.sum()) / max(energy, 1e-6))
    over_row = patches.above + (cover[:, 0] * patches.weight)[..., None] * patches.rows
    shown = lit[:, 0] * patches.weight
    paint = np.einsum("npqc,npq->c", over_row, shown, optimize=True) / max(float((shown**2).sum()), 1e-6)
    return Fit(shape if explained >= _MIN_FIT else UNCLEAR, centre, radius, light[:, 0], paint, explained)


def _cut(
    above_background: np.ndarray,
    rows: np.ndarray,
    owner: np.ndarray,
    frames: np.ndarray,
    parts: np.ndarray,
    boxes: np.ndarray,
    colour: np.ndarray,
) -> _Patches:
    _, height, width = owner.shape
    half = int(max((boxes[:, 1] - boxes[:, 0]).max(), (boxes[:, 3] - boxes[:, 2]).max())) // 2 + 1 + _MARGIN_PX
    half = min(half, int(_MAX_REACH * min(height, width)))
    reach = np.arange(-half, half + 1)
    ys = ((boxes[:, 0] + boxes[:, 1]) // 2)[:, None] + reach
    xs = ((boxes[:, 2] + boxes[:, 3]) // 2)[:, None] + reach
    inside = ((ys >= 0) & (ys < height))[:, :, None] & ((xs >= 0) & (xs < width))[:, None, :]
    y_in, x_in = np.clip(ys, 0, height - 1), np.clip(xs, 0, width - 1)
    index = (frames[:, None, None], y_in[:, :, None], x_in[:, None, :])
    above, owners = above_background[index], owner[index]
    own = (owners == parts[:, None, None]) & inside
    weight = (own | ((owners == 0) & inside)).astype(np.float32)
    row = rows[y_in][:, :, None, :]
    dot_colour, dot_row = above @ colour, (above * row).sum(axis=-1)
    row_row, row_colour = (row * row).sum(axis=-1), row @ colour
    terms = (dot_row, row_row, dot_colour, row_colour, np.float32(1.0))
    return _Patches(
        ys=ys + np.float32(0.5),
        xs=xs + np.float32(0.5),
        weight=weight,
        region=widen(own, 2) * weight,
        own=own,
        above=above,
        energy=np.einsum("npqc,npqc->npq", above, above),
        dot_colour=dot_colour,
        dot_row=dot_row,
        row_row=row_row,
        row_colour=row_colour,
        rows=row,
        by_pixel=np.stack([term * weight for term in terms], axis=-1).reshape(len(frames), -1, 5),
        colour_energy=float(colour @ colour),
    )


def _take(patches: _Patches, picks: np.ndarray) -> _Patches:
    arrays = {name: getattr(patches, name) for name in _Patches.__slots__ if name != "colour_energy"}
    return _Patches(**{name: array[picks] for name, array in arrays.items()}, colour_energy=patches.colour_energy)


def _centre_and_area(patches: _Patches) -> tuple[np.ndarray, np.ndarray]:
    """Return centres (N, 2) and areas (N,) from the coverage each pixel shows by itself.

    The second pass knows where the object is, so it allows for the shading, which moves the first pass's centre to the
    lit side.
    """
    energy = np.where(patches.own, patches.energy, 0.0)
    core = energy > 0.56 * energy.max(axis=(1, 2), keepdims=True)
    towards = np.where(core, patches.dot_colour + patches.row_colour, 0.0).sum(axis=(1, 2)) / patches.colour_energy
    shading = np.ones_like(energy)
    for is_last in (False, True):
        light = towards / np.maximum(np.where(core, shading, 0.0).sum(axis=(1, 2)), 1.0)
        light = np.clip(light, 0.1, 1.5)[:, None, None] * shading
        dot = light * patches.dot_colour - patches.dot_row
        norm = light**2 * patches.colour_energy - 2 * light * patches.row_colour + patches.row_row
        alpha = np.clip(dot / np.maximum(norm, 1.0), -0.5, 1.2) * patches.region
        area = np.maximum(alpha.sum(axis=(1, 2)), 4.0)
        x = (alpha * patches.xs[:, None, :]).sum(axis=(1, 2)) / area
        y = (alpha * patches.ys[:, :, None]).sum(axis=(1, 2)) / area
        x = np.clip(x, patches.xs[:, 0], patches.xs[:, -1])
        y = np.clip(y, patches.ys[:, 0], patches.ys[:, -1])
        if not is_last:
            radius = np.sqrt(area / np.pi)[:, None, None]
            shading = volume(
                patches.xs[:, None, :] - x[:, None, None], patches.ys[:, :, None] - y[:, None, None], radius
            )
    return np.stack([x, y], axis=1), area


def _choose_shape(patches: _Patches, centre: np.ndarray, area: np.ndarray) -> tuple[str, float, float]:
    """Return shape, factor on the radius that the area gives, and blur in pixels of the least squared error."""

    def costs(shape: str, blur_px: float) -> np.ndarray:
        radius = np.sqrt(area / AREA[shape])[:, None] * _SHAPE_FACTORS
        summed: np.ndarray = _residual(patches, shape, centre, radius, blur_px)[0].sum(axis=0)
        return summed

    tried = {(shape, blur_px): costs(shape, blur_px) for shape in SHAPES for blur_px in _BLURS_PX[:2]}
    likely = sorted(SHAPES, key=lambda shape: min(float(tried[shape, blur_px].min()) for blur_px in _BLURS_PX[:2]))
    tried |= {(shape, blur_px): costs(shape, blur_px) for shape in likely[:2] for blur_px in _BLURS_PX[2:]}
    shape, blur_px = min(tried, key=lambda key: float(tried[key].min()))
    return shape, float(_SHAPE_FACTORS[tried[shape, blur_px].argmin()]), blur_px


def _blurring(size: int, blur_px: float) -> np.ndarray:
    """Return the (P, P) matrix whose product with an image blurs its columns."""
    offset = np.arange(size)[:, None] - np.arange(size)
    kernel = np.exp(-0.5 * (offset / blur_px) ** 2)
    scaled: np.ndarray = (kernel / (blur_px * np.sqrt(2 * np.pi))).astype(np.float32)
    return scaled


def _residual(
    patches: _Patches, shape: str, centre: np.ndarray, radius: np.ndarray, blur_px: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return squared error (N, R), best light (N, R), coverage and lit coverage (N, R, P, P) of radii (N, R)."""
    dx = (patches.xs - centre[:, :1]).astype(np.float32)[:, None, None, :]
    dy = (patches.ys - centre[:, 1:]).astype(np.float32)[:, None, :, None]
    size = radius.astype(np.float32)[:, :, None, None]
    cover = coverage(shape, dx, dy, size, 1.0)
    if blur_px > 0.0:
        blurring = _blurring(cover.shape[-1], blur_px)
        along_rows = (cover.reshape(-1, cover.shape[-1]) @ blurring).reshape(cover.shape)
        cover = blurring @ along_rows
    # Shading is smooth, so that blurring it as well would change nothing.
    lit = cover * volume(dx, dy, size)
    powers = (cover, cover * cover, lit, cover * lit, lit * lit)
    sums = [
        (power.reshape(*radius.shape, -1) @ patches.by_pixel[..., place, None])[..., 0]
        for place, power in enumerate(powers)
    ]
    towards = sums[2] + sums[3]
    norm = np.maximum(patches.colour_energy * sums[4], 1e-6)
    energy = (patches.energy * patches.weight).sum(axis=(1, 2))[:, None]
    return energy + 2 * sums[0] + sums[1] - towards**2 / norm, towards / norm, cover, lit


def _refine_radius(patches: _Patches, shape: str, centre: np.ndarray, radius: np.ndarray, blur_px: float) -> np.ndarray:
    """Return the radius (N,) at the vertex of a parabola through the best of a few candidates and its neighbours."""
    cost = _residual(patches, shape, centre, radius[:, None] * _RADIUS_FACTORS, blur_px)[0]
    best = np.clip(cost.argmin(axis=1), 1, len(_RADIUS_FACTORS) - 2)
    at = np.arange(len(best))
    left, mid, right = cost[at, best - 1], cost[at, best], cost[at, best + 1]
    curvature = left - 2 * mid + right
    shift = np.where(curvature > 0, 0.5 * (left - right) / np.where(curvature > 0, curvature, 1.0), 0.0)
    step = _RADIUS_FACTORS[1] - _RADIUS_FACTORS[0]
    refined: np.ndarray = radius * (_RADIUS_FACTORS[best] + step * np.clip(shift, -1.5, 1.5))
    return refined
