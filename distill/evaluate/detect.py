"""Measures a clip from its pixels alone: objects, motion, background, and the factors that captions leave open.

Knows the world's palette, shapes and ranges; knows neither captions nor latents.

Legend: T frames, H and W rows and columns, N frames an object was seen in. Lengths are world units (1/64 of the short
side), x to the right and y downwards from the top left corner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from codmd_serve.errors import ConfigError
from distill.evaluate.background import Background, fit_background, refine_background
from distill.evaluate.fit import fit_object, widen
from distill.worlds.shapeworld.schema import (
    COLOURS,
    DIRECTIONS,
    NATIVE_NUM_FRAMES,
    RELATIONS,
    SPEEDS,
    STILL,
    WORLD_SIZE,
)

MIXED = "mixed"
NOTHING = "none"
STILL_SPEED = 0.13
"""World units per native frame below which an object stands still; the slowest motion of the world is 0.26."""
SPEED_BOUNDARY = (SPEEDS["slowly"][1] + SPEEDS["quickly"][0]) / 2
_MIN_DISTANCE = 18.0
_MIN_AREA = 12
"""Smallest part, in pixels of a 64x64 frame; the world's smallest object has 53."""
_MAX_PARTS = 6
"""Parts kept of one frame, the largest; a clip of many specks is wrong anyway and must not take minutes."""
_SPLIT_SHARE = 0.3
_SAME_PLACE = 8.0
_MIN_PRESENCE = 0.5
_LIGHTS = (0.6, 0.8, 1.0)
_COLOUR_NAMES = tuple(COLOURS)
_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1] = True


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """One object over the clip.

    Attributes:
        colour: one of COLOURS.
        shape: one of SHAPES, or "unclear".
        seen: bool (T,), frames in which it was found.
        centres: float (T, 2), x and y; nan where not seen.
        radii, lights: float (T,), radius and brightness factor of its colour; nan where not seen.
        start: (x, y) of the fitted path at the first frame.
        velocity: (x, y), world units per native frame.
        bow: (x, y), peak of the path's deviation from the straight line.
        radius, growth: at the first frame, and its relative change over the clip.
        shade, fade: brightness factor at the first frame, and its relative loss over the clip.
        paint: float (3,), mean colour in 8-bit levels, not bound to the palette.
        explained: share of the object's energy that the best render explains.
    """

    colour: str
    shape: str
    seen: np.ndarray
    centres: np.ndarray
    radii: np.ndarray
    lights: np.ndarray
    start: tuple[float, float]
    velocity: tuple[float, float]
    bow: tuple[float, float]
    radius: float
    growth: float
    shade: float
    fade: float
    paint: np.ndarray
    explained: float

    @property
    def motion(self) -> str:
        """Return one of MOTIONS, by the larger component of the velocity."""
        return motion_of(self.velocity)

    @property
    def speed(self) -> float:
        """Return world units per native frame along `motion`; the length of the velocity when still."""
        return float(np.hypot(*self.velocity) if self.motion == STILL else max(abs(v) for v in self.velocity))

    @property
    def speed_word(self) -> str | None:
        """Return one of SPEEDS, or None when still."""
        return None if self.motion == STILL else ("quickly" if self.speed > SPEED_BOUNDARY else "slowly")

    @property
    def bend(self) -> float:
        """Return the signed peak of the sideways bow, with the sign convention of the law; 0 when still."""
        if self.motion == STILL:
            return 0.0
        along = DIRECTIONS[self.motion]
        return -along[1] * self.bow[0] + along[0] * self.bow[1]


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """Everything measured on a clip.

    Attributes:
        tracks: objects seen in at least half of the frames, largest first.
        background: the fitted background.
        foreground: bool (T, H, W), pixels of any object, with a rim of two pixels.
        motion: what all objects do, one of MOTIONS; "mixed" when they differ, "none" without objects.
        speed: mean over the objects, world units per native frame; nan without objects.
        speed_word: of all objects, one of SPEEDS or None when nothing moves; "mixed" when they differ.
        relation: of the larger object to the second by the larger separation at the first frame; None unless two.
        horizon: world units; nan when there is none.
    """

    tracks: tuple[Track, ...]
    background: Background
    foreground: np.ndarray
    motion: str
    speed: float
    speed_word: str | None
    relation: str | None
    horizon: float

    @property
    def count(self) -> int:
        """Return the number of objects."""
        return len(self.tracks)


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """Connected areas of one colour in one frame, numbered from 1 in `owner` (T, H, W)."""

    owner: np.ndarray
    frame: np.ndarray
    colour_votes: np.ndarray
    area: np.ndarray
    centre: np.ndarray
    boxes: np.ndarray


def detect(clip: np.ndarray) -> Detection:
    """Measure a clip.

    Args:
        clip: uint8 (T, H, W, 3), RGB, at least 2 frames of at least 16 x 16 pixels.

    Raises:
        ConfigError: another dtype or shape.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or clip.shape[0] < 2 or min(clip.shape[1:3]) < 16:
        raise ConfigError(f"expected a uint8 clip (T >= 2, H >= 16, W >= 16, 3), got {clip.dtype} {clip.shape}")
    planes = clip.transpose(3, 0, 1, 2).astype(np.float32, order="C")
    first = fit_background(planes)
    rim = widen(_distance(planes, first)[1], 2)
    background = refine_background(first, planes, rim)
    squared, mask = _distance(planes, background)
    rim = widen(mask, 2)
    scale = min(clip.shape[1:3]) / WORLD_SIZE
    parts = _find_parts(mask, planes, squared, background, scale)
    tracks = [
        _measure_track(chain, parts, planes, background, scale)
        for chain in _link(parts, clip.shape[0], scale)
        if len(chain) >= _MIN_PRESENCE * clip.shape[0]
    ]
    tracks.sort(key=lambda track: -track.radius)
    return _summarise(tuple(tracks), background, rim, scale)


def motion_of(velocity: tuple[float, float]) -> str:
    """Return the motion, one of MOTIONS, of a velocity (x, y) in world units per native frame."""
    if np.hypot(*velocity) < STILL_SPEED:
        return STILL
    axis = 0 if abs(velocity[0]) >= abs(velocity[1]) else 1
    sign = 1 if velocity[axis] > 0 else -1
    return next(name for name, step in DIRECTIONS.items() if step[axis] == sign)


def relation_holds(relation: str, first: Track, second: Track) -> bool:
    """Return whether a stated relation holds along its axis at the first frame."""
    step = RELATIONS[relation]
    return sum(s * (a - b) for s, a, b in zip(step, first.start, second.start, strict=True)) > 0


def relation_of(first: Track, second: Track) -> str:
    """Return the relation of `first` to `second`, by the axis of the larger separation at the first frame."""
    gap = (first.start[0] - second.start[0], first.start[1] - second.start[1])
    axis = 0 if abs(gap[0]) >= abs(gap[1]) else 1
    sign = 1 if gap[axis] > 0 else -1
    return next(name for name, step in RELATIONS.items() if step[axis] == sign)


def _distance(planes: np.ndarray, background: Background) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared distance of every pixel from the background, and which are an object's, both (T, H, W)."""
    squared = np.zeros(planes.shape[1:], dtype=np.float32)
    for plane, row in zip(planes, background.rows.T, strict=True):
        above = plane - row[:, None]
        above *= above
        squared += above
    # Most pixels are background, so the median distance measures the noise.
    threshold = max(_MIN_DISTANCE**2, 9.0 * float(np.median(squared[::4])))
    return squared, squared > threshold


def _find_parts(
    mask: np.ndarray, planes: np.ndarray, squared: np.ndarray, background: Background, scale: float
) -> _Parts:
    labels, _ = ndimage.label(mask, _IN_PLANE)
    ts, ys, xs = np.nonzero(mask)
    label, weight = labels[mask], np.sqrt(squared[mask])
    above = np.stack([plane[mask] for plane in planes]) - background.rows[ys].T
    colour = _nearest_colours(above, ys, background)
    num = len(_COLOUR_NAMES)
    votes = np.bincount(label * num + colour, weights=weight**2, minlength=(int(labels.max()) + 1) * num)
    votes = votes.reshape(-1, num)
    # Two touching objects are one area of two colours; edges alone never make up this share.
    is_kept = votes >= _SPLIT_SHARE * votes.sum(axis=1, keepdims=True)
    is_kept[np.arange(len(votes)), votes.argmax(axis=1)] = True
    colour = np.where(is_kept[label, colour], colour, votes.argmax(axis=1)[label])
    ids, part = np.unique(label * num + colour, return_inverse=True)
    area = np.bincount(part, minlength=len(ids))
    frame = np.zeros(len(ids), dtype=int)
    frame[part] = ts
    is_large = (area >= _MIN_AREA * scale**2) & (_rank_in_frame(frame, area) < _MAX_PARTS)
    renumber = np.where(is_large, np.cumsum(is_large), 0)
    owner = np.zeros(mask.shape, dtype=np.int32)
    owner[ts, ys, xs] = renumber[part]
    mean = (
        [np.bincount(part, weights=v * weight) / np.bincount(part, weights=weight) for v in (xs, ys)]
        if len(ids)
        else []
    )
    boxes = [(z[1].start, z[1].stop, z[2].start, z[2].stop) for z in ndimage.find_objects(owner)]
    part_votes = np.zeros((len(ids), num))
    part_votes[np.arange(len(ids)), ids % num] = area
    return _Parts(
        owner=owner,
        frame=frame[is_large],
        colour_votes=part_votes[is_large],
        area=area[is_large],
        centre=(np.stack(mean, axis=1) + 0.5)[is_large] if len(ids) else np.zeros((0, 2)),
        boxes=np.array(boxes, dtype=int).reshape(-1, 4),
    )


def _rank_in_frame(frame: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Return each part's place among those of its frame, 0 for the largest."""
    order = np.lexsort((-area, frame))
    first = np.searchsorted(frame[order], frame[order])
    rank = np.empty(len(frame), dtype=int)
    rank[order] = np.arange(len(frame)) - first
    return rank


def _nearest_colours(above: np.ndarray, ys: np.ndarray, background: Background) -> np.ndarray:
    """Return for pixels (3, K) less background the index of the palette colour whose mixture they are.

    Mixing with the background changes the length of this difference and not its direction, so edges count too.
    """
    palette = np.array([COLOURS[name] for name in _COLOUR_NAMES], dtype=np.float32)
    paints = (palette[:, None] * np.array(_LIGHTS, dtype=np.float32)[:, None]).reshape(-1, 3)
    colour = np.empty(above.shape[1], dtype=np.int64)
    is_below = ys + 0.5 > background.horizon_px  # nan compares false: no horizon, all above
    for chosen, level in ((~is_below, background.above), (is_below, background.below)):
        direction = paints - level
        direction /= np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-3)
        likeness = np.einsum("lc,ck->lk", direction, above[:, chosen])
        colour[chosen] = likeness.argmax(axis=0) // len(_LIGHTS)
    return colour


def _link(parts: _Parts, num_frames: int, scale: float) -> list[list[int]]:
    """Link parts over frames, by colour and then by position; each chain lists part indices, one per frame."""
    chains: list[list[int]] = []
    colours = parts.colour_votes.argmax(axis=1) if len(parts.frame) else np.zeros(0, dtype=int)
    for frame in range(num_frames):
        here: list[int] = np.nonzero(parts.frame == frame)[0].tolist()
        pairs = []
        for number, chain in enumerate(chains):
            last = chain[-1]
            for index in here:
                gap = float(np.hypot(*(parts.centre[index] - parts.centre[last])))
                is_same = colours[index] == colours[chain[0]] or colours[index] == colours[last]
                if is_same or gap < _SAME_PLACE * scale:
                    pairs.append((not is_same, gap, number, index))
        used: set[int] = set()
        extended: set[int] = set()
        for _, _, number, index in sorted(pairs):
            if number not in extended and index not in used:
                chains[number].append(index)
                extended.add(number)
                used.add(index)
        chains.extend([index] for index in here if index not in used)
    return chains


def _measure_track(chain: list[int], parts: _Parts, planes: np.ndarray, background: Background, scale: float) -> Track:
    index = np.array(chain)
    colour = _COLOUR_NAMES[int(parts.colour_votes[index].sum(axis=0).argmax())]
    frames = parts.frame[index]
    fit = fit_object(planes, background.rows, parts.owner, frames, index + 1, parts.boxes[index], colour)
    num_frames = planes.shape[1]
    tau = frames / (num_frames - 1)
    start, total, bow = _fit_path(tau, fit.centre / scale)
    radius, radius_change = _line(tau, fit.radius / scale)
    light, light_change = _line(tau, fit.light)
    seen = np.zeros(num_frames, dtype=bool)
    seen[frames] = True
    centres, radii, lights = (np.full((num_frames, *shape), np.nan) for shape in ((2,), (), ()))
    centres[frames], radii[frames], lights[frames] = fit.centre / scale, fit.radius / scale, fit.light
    velocity = total / (NATIVE_NUM_FRAMES - 1)
    return Track(
        colour=colour,
        shape=fit.shape,
        seen=seen,
        centres=centres,
        radii=radii,
        lights=lights,
        start=(float(start[0]), float(start[1])),
        velocity=(float(velocity[0]), float(velocity[1])),
        bow=(float(bow[0]), float(bow[1])),
        radius=radius,
        growth=radius_change / max(radius, 1e-3),
        shade=light,
        fade=-light_change / max(light, 1e-3),
        paint=fit.paint,
        explained=fit.explained,
    )


def _fit_path(tau: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit start + total * tau + bow * sin(pi * tau) to centres (N, 2), leaving out jumps; return the three (2,)."""
    basis = np.stack([np.ones_like(tau), tau, np.sin(np.pi * tau)], axis=1)
    coefficients = np.linalg.lstsq(basis, centre, rcond=None)[0]
    error = np.abs(centre - basis @ coefficients).max(axis=1)
    kept = error <= max(2.0, 3.0 * float(np.median(error)))
    if not kept.all():
        coefficients = np.linalg.lstsq(basis[kept], centre[kept], rcond=None)[0]
    return coefficients[0], coefficients[1], coefficients[2]


def _line(tau: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return intercept and slope by the median of all pairwise slopes (Theil-Sen), robust to a few bad frames.

    Source: Theil 1950 and Sen 1968.
    """
    first, second = np.triu_indices(len(tau), k=1)
    if len(first) == 0:
        return float(values[0]), 0.0
    slope = float(np.median((values[second] - values[first]) / (tau[second] - tau[first])))
    return float(np.median(values - slope * tau)), slope


def _summarise(tracks: tuple[Track, ...], background: Background, rim: np.ndarray, scale: float) -> Detection:
    motions = {track.motion for track in tracks}
    words = {track.speed_word for track in tracks}
    return Detection(
        tracks=tracks,
        background=background,
        foreground=rim,
        motion=motions.pop() if len(motions) == 1 else (MIXED if motions else NOTHING),
        speed=float(np.mean([track.speed for track in tracks])) if tracks else float("nan"),
        speed_word=words.pop() if len(words) == 1 else (MIXED if words else None),
        relation=relation_of(*tracks) if len(tracks) == 2 else None,
        horizon=background.horizon_px / scale,
    )
