"""Fits one object over time to rendered shapes: shape, position, radius and brightness.

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
_RADIUS_FACTORS = np.array([0.94, 1.0, 1.06], dtype=np.float32)
_BLURS_PX = (0.0, 1.2, 0.7, 2.0)
"""Gaussian blurs of the render that are tried, the first two for every shape. Without them a blurred thin shape reads
as dark, a small ring as a disc and a triangle, its corners gone, as a circle."""
_MIN_FIT = 0.5
_MARGIN_PX = 3
_MAX_REACH = 0.4
"""Half a patch at most, of a frame's short side; the world's largest object reaches 0.33."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """The fit of one object in the N frames that show it.

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
    """Sums over channels that all candidates share, in patches around the object: (N, P, P), or (N, P, 1).

    `above` is the pixels less background, (3, N, P, P), and `rows` the background, (3, N, P, 1).
    """

    ys: np.ndarray
    xs: np.ndarray
    weight: np.ndarray
    region: np.ndarray
    own: np.ndarray
    above: np.ndarray
    rows: np.ndarray
    energy: np.ndarray
    dot_colour: np.ndarray
    dot_row: np.ndarray
    row_row: np.ndarray
    row_colour: np.ndarray
    colour_energy: float


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Coefficients of a candidate's coverage m, for one shading of the patches.

    Attributes:
        energy: (N,), of the pixels less background.
        by_cover: (N, P * P, 2), factors of m.
        by_square: (N, P * P, 3), factors of its square.
    """

    energy: np.ndarray
    by_cover: np.ndarray
    by_square: np.ndarray
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
    planes: np.ndarray,
    rows: np.ndarray,
    owner: np.ndarray,
    frames: np.ndarray,
    parts: np.ndarray,
    boxes: np.ndarray,
    colour: str,
) -> Fit:
    """Fit one object in all frames it was seen in.

    Args:
        planes: float32 (3, T, H, W), the clip, 8-bit levels.
        rows: float32 (H, 3), background.
        owner: int (T, H, W), 0 for background, else the part a pixel belongs to.
        frames: int (N,), frame of each part.
        parts: int (N,), the object's part in that frame.
        boxes: int (N, 4), y0, y1, x0, x1 of each part, ends excluded.
        colour: one of COLOURS.
    """
    patches = _cut(planes, rows, owner, frames, parts, boxes, np.array(COLOURS[colour], dtype=np.float32))
    centre, area = _centre_and_area(patches)
    picks = np.unique(np.linspace(0, len(frames) - 1, min(_SHAPE_FRAMES, len(frames))).round().astype(int))
    shape, factor, blur_px = _choose_shape(_select(patches, picks), centre[picks], area[picks])
    radius = np.sqrt(area / AREA[shape]) * factor
    shading = _shade(patches, centre, radius)
    sums = _sum_up(patches, shading)
    radius = _refine_radius(patches, sums, shape, centre, radius, blur_px)
    cover = _blur(_cover(patches, shape, centre, radius[:, None]), blur_px)
    residual, light = _residual(sums, cover)
    explained = max(0.0, 1.0 - float(residual.sum()) / max(float(sums.energy.sum()), 1e-6))
    over_row = patches.above + (cover[:, 0] * patches.weight) * patches.rows
    shown = cover[:, 0] * shading * patches.weight
    paint = (over_row * shown).sum(axis=(1, 2, 3)) / max(float((shown**2).sum()), 1e-6)
    return Fit(shape if explained >= _MIN_FIT else UNCLEAR, centre, radius, light[:, 0], paint, explained)


def _cut(
    planes: np.ndarray,
    rows: np.ndarray,
    owner: np.ndarray,
    frames: np.ndarray,
    parts: np.ndarray,
    boxes: np.ndarray,
    colour: np.ndarray,
) -> _Patches:
    _, height, width = owner.shape
    half = int(max((boxes[:, 1] - boxes[:, 0]).max(), (boxes[:, 3] - boxes[:, 2]).max())) // 2 + 1 + _MARGIN_PX
    side = 2 * min(half, int(_MAX_REACH * min(height, width))) + 1
    # A patch at the edge of the frame is moved inside.
    top = np.clip((boxes[:, 0] + boxes[:, 1] - side) // 2, 0, height - side)
    left = np.clip((boxes[:, 2] + boxes[:, 3] - side) // 2, 0, width - side)
    windows = [np.s_[t, y : y + side, x : x + side] for t, y, x in zip(frames, top, left, strict=True)]
    owners = np.stack([owner[window] for window in windows])
    own = owners == parts[:, None, None]
    ys, xs = top[:, None] + np.arange(side), left[:, None] + np.arange(side)
    row = rows[ys].transpose(2, 0, 1)[..., None]
    above = np.stack([planes[(slice(None), *window)] for window in windows], axis=1) - row
    return _Patches(
        ys=ys + np.float32(0.5),
        xs=xs + np.float32(0.5),
        weight=(own | (owners == 0)).astype(np.float32),
        region=widen(own, 2) & (own | (owners == 0)),
        own=own,
        above=above,
        rows=row,
        energy=_dot(above, above),
        dot_colour=_dot(above, colour),
        dot_row=_dot(above, row),
        row_row=_dot(row, row),
        row_colour=_dot(row, colour),
        colour_energy=float(colour @ colour),
    )


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the sum over three channels, which come first."""
    total: np.ndarray = first[0] * second[0] + first[1] * second[1] + first[2] * second[2]
    return total


def _select(patches: _Patches, picks: np.ndarray) -> _Patches:
    values = {name: getattr(patches, name) for name in _Patches.__slots__}
    taken = {name: values[name][:, picks] for name in ("above", "rows")}
    rest = {name: value[picks] for name, value in values.items() if name not in (*taken, "colour_energy")}
    return _Patches(**taken, **rest, colour_energy=patches.colour_energy)


def _shade(patches: _Patches, centre: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return the shading (N, P, P) of a shape at centres (N, 2) with radii (N,)."""
    dx = (patches.xs - centre[:, :1]).astype(np.float32)[:, None, :]
    dy = (patches.ys - centre[:, 1:]).astype(np.float32)[:, :, None]
    return volume(dx, dy, radius.astype(np.float32)[:, None, None])


def _sum_up(patches: _Patches, shading: np.ndarray) -> _Sums:
    """Fold a shading into the shared sums; the candidates' radii differ too little to change it."""
    weight, num = patches.weight, len(patches.weight)
    by_cover = (patches.dot_row * weight, patches.dot_colour * shading * weight)
    by_square = (patches.row_row * weight, patches.row_colour * shading * weight, shading * shading * weight)
    return _Sums(
        energy=(patches.energy * weight).sum(axis=(1, 2)),
        by_cover=np.stack([term.reshape(num, -1) for term in by_cover], axis=-1),
        by_square=np.stack([term.reshape(num, -1) for term in by_square], axis=-1),
        colour_energy=patches.colour_energy,
    )


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
        centre = np.stack([x, y], axis=1)
        if not is_last:
            shading = _shade(patches, centre, np.sqrt(area / np.pi))
    return centre, area


def _choose_shape(patches: _Patches, centre: np.ndarray, area: np.ndarray) -> tuple[str, float, float]:
    """Return the shape, radius factor and blur in pixels with the least squared error."""
    sums = _sum_up(patches, _shade(patches, centre, np.sqrt(area / np.pi)))
    covers = {
        shape: _cover(patches, shape, centre, np.sqrt(area / AREA[shape])[:, None] * _SHAPE_FACTORS) for shape in SHAPES
    }

    def costs(shape: str, blur_px: float) -> np.ndarray:
        summed: np.ndarray = _residual(sums, _blur(covers[shape], blur_px))[0].sum(axis=0)
        return summed

    tried = {(shape, blur_px): costs(shape, blur_px) for shape in SHAPES for blur_px in _BLURS_PX[:2]}
    likely = sorted(SHAPES, key=lambda shape: min(float(tried[shape, blur_px].min()) for blur_px in _BLURS_PX[:2]))
    tried |= {(shape, blur_px): costs(shape, blur_px) for shape in likely[:2] for blur_px in _BLURS_PX[2:]}
    shape, blur_px = min(tried, key=lambda key: float(tried[key].min()))
    return shape, float(_SHAPE_FACTORS[tried[shape, blur_px].argmin()]), blur_px


def _cover(patches: _Patches, shape: str, centre: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return the coverage (N, R, P, P) of candidate radii (N, R)."""
    dx = (patches.xs - centre[:, :1]).astype(np.float32)[:, None, None, :]
    dy = (patches.ys - centre[:, 1:]).astype(np.float32)[:, None, :, None]
    return coverage(shape, dx, dy, radius.astype(np.float32)[:, :, None, None], 1.0)


def _blur(cover: np.ndarray, blur_px: float) -> np.ndarray:
    """Blur (N, R, P, P) by a Gaussian of `blur_px` with shifted sums: BLAS would start its threads."""
    if blur_px == 0.0:
        return cover
    for axis in (2, 3):
        blurred = cover * np.float32(1.0 / (blur_px * np.sqrt(2 * np.pi)))
        for shift in range(1, min(int(np.ceil(3 * blur_px)), cover.shape[axis] - 1) + 1):
            tap = cover * np.float32(np.exp(-0.5 * (shift / blur_px) ** 2) / (blur_px * np.sqrt(2 * np.pi)))
            near, far = [slice(None)] * 4, [slice(None)] * 4
            near[axis], far[axis] = slice(None, -shift), slice(shift, None)
            blurred[tuple(near)] += tap[tuple(far)]
            blurred[tuple(far)] += tap[tuple(near)]
        cover = blurred
    return cover


def _residual(sums: _Sums, cover: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return squared error (N, R) and best light (N, R) of candidates whose coverage is (N, R, P, P)."""
    flat = cover.reshape(*cover.shape[:2], -1)
    linear, square = flat @ sums.by_cover, (flat * flat) @ sums.by_square
    towards = linear[..., 1] + square[..., 1]
    norm = np.maximum(sums.colour_energy * square[..., 2], 1e-6)
    return sums.energy[:, None] + 2 * linear[..., 0] + square[..., 0] - towards**2 / norm, towards / norm


def _refine_radius(
    patches: _Patches, sums: _Sums, shape: str, centre: np.ndarray, radius: np.ndarray, blur_px: float
) -> np.ndarray:
    """Return the radius (N,) at the vertex of a parabola through the best of a few candidates and its neighbours."""
    cost = _residual(sums, _blur(_cover(patches, shape, centre, radius[:, None] * _RADIUS_FACTORS), blur_px))[0]
    best = np.clip(cost.argmin(axis=1), 1, len(_RADIUS_FACTORS) - 2)
    at = np.arange(len(best))
    left, mid, right = cost[at, best - 1], cost[at, best], cost[at, best + 1]
    curvature = left - 2 * mid + right
    shift = np.where(curvature > 0, 0.5 * (left - right) / np.where(curvature > 0, curvature, 1.0), 0.0)
    step = _RADIUS_FACTORS[1] - _RADIUS_FACTORS[0]
    refined: np.ndarray = radius * (_RADIUS_FACTORS[best] + step * np.clip(shift, -1.5, 1.5))
    return refined
