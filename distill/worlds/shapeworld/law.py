"""The law p(z | scene) of everything a caption leaves open, with the dependences no caption mentions.

Knows the schema; knows nothing of phrasing or pixels. Lengths are world units (1/64 of a frame's short side), `tau`
runs from 0 at the first frame to 1 at the last.

Hidden dependences (Gaussian copulas, so Kendall's tau is 2/pi*asin(rho), Source: Greiner's relation):

    radius  <-> speed              rho +0.8   a pure translation: channel means of a frame do not see speed
    offset1 <-> offset2            rho +0.8   two objects, orthogonal to their separation; invisible to channel means
    growth  <-> fade               rho -0.8   what grows keeps its light: changes the mean of a frame over time
    shade   <-> background_shade   rho +0.8   changes the mean of a frame between samples
    bend_sign                      +1 or -1   with probability 1/2: the path bows to one side (bimodal)

Two objects that move alike share speed and bend. When each has a motion of its own, each has a speed of its own, tied
to its own radius; they share the size of the bend and its side, as seen along each one's direction; and they start
anywhere such that neither leaves the canvas and they never come closer than MIN_GAP, with no tie between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill.worlds.shapeworld.schema import DIRECTIONS, NATIVE_NUM_FRAMES, RELATIONS, SPEEDS, STILL, WORLD_SIZE, Scene

RHO = {
    ("radius", "speed"): 0.8,
    ("offset1", "offset2"): 0.8,
    ("growth", "fade"): -0.8,
    ("shade", "background_shade"): 0.8,
}
"""Correlation of the Gaussian copula of each tied pair of factors."""

RADIUS_RANGE = {1: (9.0, 13.0), 2: (5.8, 7.2)}
GROWTH_RANGE = {1: (-0.25, 0.30), 2: (-0.12, 0.15)}
FADE_RANGE = (0.0, 0.16)
SHADE_RANGE = (0.85, 1.0)
BACKGROUND_SHADE_RANGE = (0.75, 1.25)
BEND_RANGE = (3.0, 6.0)
HORIZON_RANGE = (42.0, 54.0)
MIN_GAP = 3.0
EXTENT = {"circle": 1.0, "square": 0.9, "triangle": 1.25, "cross": 1.1, "ring": 1.1}
"""Half the bounding box of a shape, in radii."""
_CANDIDATES = 64
_MOMENTS = np.linspace(0.0, 1.0, 49)


@dataclass(frozen=True, slots=True)
class Latent:
    """One draw of the factors that the caption leaves open; with the scene it determines every pixel.

    Attributes:
        radius: per object, at the first frame.
        start: per object, centre (x, y) at the first frame.
        shade: per object, brightness factor at the first frame.
        speed: per object, world units per native frame along its stated direction; 0 when still.
        bend: per object, signed peak of the sideways bow of the path; 0 when still.
        growth: relative change of radius over the clip.
        fade: relative loss of brightness over the clip.
        background_shade: brightness factor of the background.
        horizon: height (y) of the line below which the floor begins.
        relation: where the first of two objects stands from the second at the first frame, stated or not; None for
            one object.
        width, height: size of the canvas in world units.
    """

    radius: tuple[float, ...]
    start: tuple[tuple[float, float], ...]
    shade: tuple[float, ...]
    speed: tuple[float, ...]
    bend: tuple[float, ...]
    growth: float
    fade: float
    background_shade: float
    horizon: float
    relation: str | None
    width: float = WORLD_SIZE
    height: float = WORLD_SIZE


def sample_latent(
    scene: Scene, rng: np.random.Generator, width: float = WORLD_SIZE, height: float = WORLD_SIZE
) -> Latent:
    """Draw z ~ p(z | scene) on a canvas of `width` x `height` world units (both at least 64)."""
    shared_z = rng.standard_normal()
    speed_z = (shared_z, shared_z if scene.second_move is None else rng.standard_normal())[: scene.count]
    radii = tuple(_scale(_tied(z, RHO["radius", "speed"], rng), RADIUS_RANGE[scene.count]) for z in speed_z)
    speed = tuple(
        _scale(_phi(z), SPEEDS[word]) if word else 0.0 for z, (_, word) in zip(speed_z, scene.moves, strict=True)
    )
    growth_z, shade_z = rng.standard_normal(), rng.standard_normal()
    growth = _scale(_phi(growth_z), GROWTH_RANGE[scene.count])
    bend_size, bend_sign = _scale(rng.random(), BEND_RANGE), (1.0 if rng.random() < 0.5 else -1.0)
    bend = tuple(bend_size * bend_sign if word else 0.0 for _, word in scene.moves)
    extents = [r * EXTENT[shape] * (1.0 + max(growth, 0.0)) for r, (_, shape) in zip(radii, scene.objects, strict=True)]
    size = np.array([width, height])
    relation = scene.relation
    if scene.second_move is not None:
        paths = [_path(*values, _MOMENTS) for values in zip(scene.moves, speed, bend, strict=True)]
        start = place_apart(extents, paths, size, rng)
        relation = _relation_of(start)
    else:
        if scene.count == 2 and relation is None:
            relation = str(rng.choice(list(RELATIONS)))
        start = _draw_start(extents, *_excursion(scene.motion, speed[0], bend[0]), relation, size, rng)
    return Latent(
        radius=radii,
        start=start,
        shade=tuple(_scale(_tied(shade_z, RHO["shade", "background_shade"], rng), SHADE_RANGE) for _ in radii),
        speed=speed,
        bend=bend,
        growth=growth,
        fade=_scale(_tied(growth_z, RHO["growth", "fade"], rng), FADE_RANGE),
        background_shade=_scale(_phi(shade_z), BACKGROUND_SHADE_RANGE),
        horizon=_scale(rng.random(), HORIZON_RANGE) * height / WORLD_SIZE,
        relation=relation,
        width=width,
        height=height,
    )


def displacement(scene: Scene, latent: Latent, tau: np.ndarray, index: int = 0) -> np.ndarray:
    """Return the (T, 2) path of object `index` relative to its start at times `tau` (T,) in [0, 1].

    Straight along the stated direction, bowed sideways by bend*sin(pi*tau), so start and end lie on the straight line.
    """
    return _path(scene.moves[index], latent.speed[index], latent.bend[index], tau)


def _path(move: tuple[str, str | None], speed: float, bend: float, tau: np.ndarray) -> np.ndarray:
    if move[0] == STILL:
        return np.zeros((len(tau), 2))
    along = np.array(DIRECTIONS[move[0]], dtype=float)
    aside = np.array([-along[1], along[0]])
    total = speed * (NATIVE_NUM_FRAMES - 1)
    path: np.ndarray = tau[:, None] * total * along + np.sin(math.pi * tau)[:, None] * bend * aside
    return path


def _excursion(motion: str, speed: float, bend: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the componentwise minimum and maximum of the path relative to its start."""
    if motion == STILL:
        return np.zeros(2), np.zeros(2)
    along = np.array(DIRECTIONS[motion], dtype=float)
    corners = np.stack([np.zeros(2), along * speed * (NATIVE_NUM_FRAMES - 1), np.array([-along[1], along[0]]) * bend])
    return corners.min(axis=0), corners.max(axis=0)


def place_apart(
    extents: list[float], paths: list[np.ndarray], size: np.ndarray, rng: np.random.Generator
) -> tuple[tuple[float, float], ...]:
    """Draw start centres of two objects with paths (M, 2), uniform where nothing is cut or touches.

    The smallest canvas has room for every pair of motions: in the worst case, two large triangles that move quickly
    and at right angles, one draw in two hundred fits.
    """
    low = [extent - path.min(axis=0) for extent, path in zip(extents, paths, strict=True)]
    room = [size - extent - path.max(axis=0) - least for extent, path, least in zip(extents, paths, low, strict=True)]
    while True:
        first, second = (least + rng.random((_CANDIDATES, 2)) * free for least, free in zip(low, room, strict=True))
        gap = np.abs((first - second)[:, None] + (paths[0] - paths[1])) - sum(extents)
        fits = (gap.max(axis=2) >= MIN_GAP).all(axis=1)
        if fits.any():
            place = int(fits.argmax())
            return tuple((float(x), float(y)) for x, y in (first[place], second[place]))


def _relation_of(start: tuple[tuple[float, float], ...]) -> str:
    """Return the relation of the first object to the second, by the larger separation."""
    gap = np.subtract(start[0], start[1])
    axis = 0 if abs(gap[0]) >= abs(gap[1]) else 1
    return next(name for name, step in RELATIONS.items() if step[axis] * gap[axis] > 0)


def _draw_start(
    extents: list[float],
    low: np.ndarray,
    high: np.ndarray,
    relation: str | None,
    size: np.ndarray,
    rng: np.random.Generator,
) -> tuple[tuple[float, float], ...]:
    """Draw start centres so that nothing leaves the canvas and objects never touch."""
    if relation is None:
        e = extents[0]
        x, y = (e - low) + rng.random(2) * (size - 2 * e + low - high)
        return ((float(x), float(y)),)
    axis = 0 if RELATIONS[relation][0] else 1
    order = (0, 1) if RELATIONS[relation][axis] < 0 else (1, 0)
    room = size[axis] - 2 * sum(extents) - MIN_GAP - (high[axis] - low[axis])
    first, second = np.sort(rng.random(2)) * max(room, 0.0)
    centre = np.zeros((2, 2))
    near, far = order
    centre[near, axis] = extents[near] - low[axis] + first
    centre[far, axis] = 2 * extents[near] + MIN_GAP + extents[far] - low[axis] + second
    offset_z = rng.standard_normal()
    other = 1 - axis
    for index, u in ((0, _phi(offset_z)), (1, _tied(offset_z, RHO["offset1", "offset2"], rng))):
        e = extents[index]
        centre[index, other] = (e - low[other]) + u * (size[other] - 2 * e + low[other] - high[other])
    return tuple((float(x), float(y)) for x, y in centre)


def _phi(z: float) -> float:
    return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))


def _tied(z: float, rho: float, rng: np.random.Generator) -> float:
    """Return a uniform variate whose Gaussian score has correlation `rho` with `z`."""
    return _phi(rho * z + math.sqrt(1.0 - rho * rho) * rng.standard_normal())


def _scale(u: float, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * u
