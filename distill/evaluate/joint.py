"""Distances of samples from the known joint law of factors: margins, dependence and spread, reported separately.

Margins and dependence are separate because either can be right while the other is wrong (Sklar's theorem).

Legend: S seeds of one caption, F factors, C captions, R resamples.
"""

from __future__ import annotations

import numpy as np

from distill.evaluate.detect import Detection, Track
from distill.evaluate.scores import pair_objects
from distill.worlds.shapeworld.law import (
    BACKGROUND_SHADE_RANGE,
    BEND_RANGE,
    EXTENT,
    FADE_RANGE,
    GROWTH_RANGE,
    HORIZON_RANGE,
    RADIUS_RANGE,
    RHO,
    SHADE_RANGE,
)
from distill.worlds.shapeworld.schema import DIRECTIONS, NATIVE_NUM_FRAMES, RELATIONS, SPEEDS, WORLD_SIZE, Scene

FACTORS = (
    "radius",
    "speed",
    "growth",
    "fade",
    "shade",
    "background_shade",
    "bend",
    "horizon",
    "offset1",
    "offset2",
    "place_x",
    "place_y",
)
"""Each in units of its range in the law, so mostly in [0, 1]; bend is signed, in units of the largest bow."""
TIED_PAIRS = tuple(RHO)
OUTSIDE = 0.5
"""How far beyond its range a factor is still told apart; missing ones count as this far below."""
_LEVELS = (np.arange(64) + 0.5) / 64


def measure_factors(scene: Scene, detection: Detection) -> np.ndarray:
    """Return every factor of FACTORS of a detection.

    Where objects with a motion of their own start is not a factor: the law ties their places to nothing.

    Returns:
        float (F,) in [-0.5, 1.5] (bend in [-1.5, 1.5]); nan for a factor the scene does not have, and -0.5 for one
        that it has but that could not be measured because its object is missing.
    """
    tracks = [track for track in pair_objects(scene, detection) if track is not None]
    values = dict.fromkeys(FACTORS, np.nan)
    expected = {"radius", "growth", "fade", "shade", "background_shade", "horizon"}
    expected |= {"speed", "bend"} if any(word for _, word in scene.moves) else set()
    if scene.second_move is None:
        expected |= {"offset1", "offset2"} if scene.count == 2 else {"place_x", "place_y"}
    if tracks:
        values |= _shared(scene, pair_objects(scene, detection))
        if len(tracks) == scene.count and scene.second_move is None:
            values |= _places(scene, tracks)
    values["background_shade"] = _unit(detection.background.shade, BACKGROUND_SHADE_RANGE)
    values["horizon"] = _unit(detection.horizon, HORIZON_RANGE)
    filled = [
        (-OUTSIDE if np.isnan(values[name]) else values[name]) if name in expected else np.nan for name in FACTORS
    ]
    clipped: np.ndarray = np.clip(filled, -OUTSIDE, 1.0 + OUTSIDE)
    bend = FACTORS.index("bend")
    clipped[bend] = np.clip(filled[bend], -1.5, 1.5)
    return clipped


def marginal_distances(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the Wasserstein-1 distance of each factor for one caption, in standard deviations of the truth.

    Args:
        samples: (S, F), nan columns for factors the caption does not have.
        truth: (S', F), the same of ground-truth renders.

    Returns:
        float (F,), nan where the caption has no such factor.
    """
    defined = ~np.isnan(truth).any(axis=0)
    distances = np.full(truth.shape[1], np.nan)
    if len(samples) and defined.any():
        gap = np.quantile(samples[:, defined], _LEVELS, axis=0) - np.quantile(truth[:, defined], _LEVELS, axis=0)
        distances[defined] = np.abs(gap).mean(axis=0) / np.maximum(truth[:, defined].std(axis=0), 1e-3)
    return distances


def pair_taus(groups: list[np.ndarray], counts: list[np.ndarray] | None = None) -> np.ndarray:
    """Return Kendall's tau of every tied pair; concordance is counted within captions and pooled over them.

    Args:
        groups: per caption the factors (S, F).
        counts: per caption how often each seed is drawn, (R, S); None is every seed once.

    Returns:
        float (R, number of TIED_PAIRS); R is 1 without counts. A pair that no caption has is nan, one whose factors
        never vary is 0.
    """
    num = 1 if counts is None else counts[0].shape[0]
    taus = np.full((num, len(TIED_PAIRS)), np.nan)
    for place, (first, second) in enumerate(TIED_PAIRS):
        signed, total = np.zeros(num), np.zeros(num)
        for number, factors in enumerate(groups):
            a, b = factors[:, FACTORS.index(first)], factors[:, FACTORS.index(second)]
            if np.isnan(a).any() or np.isnan(b).any():
                continue
            sign = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
            weight = np.ones((1, len(a))) if counts is None else counts[number]
            signed += ((weight @ sign) * weight).sum(axis=1)
            total += weight.sum(axis=1) ** 2 - (weight**2).sum(axis=1)
        if (total > 0).all():
            taus[:, place] = signed / total
    return taus


def dependence_distance(taus: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the mean over tied pairs of |tau - tau of the truth|: (R, P) and (1, P) or (R, P) to (R,)."""
    gap = np.abs(taus - truth)
    is_known = ~np.isnan(gap)
    distance: np.ndarray = np.where(is_known, gap, 0.0).sum(axis=1) / np.maximum(is_known.sum(axis=1), 1)
    return distance


def bend_coverage(samples: np.ndarray) -> float:
    """Return twice the share of the rarer bow side among clearly bowed paths: 1 is both modes alike, 0 one or none.

    Args:
        samples: (S, F) of one caption; nan when nothing moves.
    """
    bend = samples[:, FACTORS.index("bend")]
    if np.isnan(bend).any() or len(bend) == 0:
        return float("nan")
    least = 0.5 * BEND_RANGE[0] / BEND_RANGE[1]
    return 2.0 * min(float((bend > least).mean()), float((bend < -least).mean()))


def factor_spread(samples: np.ndarray, truth: np.ndarray) -> float:
    """Return samples' mean pairwise distance relative to the truth's, factors in sd of the truth; 1 is ideal.

    Args:
        samples, truth: (S, F) and (S', F); nan columns are left out. nan with fewer than two samples.
    """
    defined = ~np.isnan(truth).any(axis=0)
    if len(samples) < 2 or len(truth) < 2:
        return float("nan")
    scale = np.maximum(truth[:, defined].std(axis=0), 1e-3)
    return mean_distance(samples[:, defined] / scale) / max(mean_distance(truth[:, defined] / scale), 1e-6)


def pixel_points(clips: np.ndarray) -> np.ndarray:
    """Flatten clips uint8 (S, T, H, W, 3) for pixel distances: every fourth frame, 2x2 means; float32 (S, D)."""
    frames = clips[:, ::4].astype(np.float32)
    size, num, height, width, _ = frames.shape
    pooled: np.ndarray = frames.reshape(size, num, height // 2, 2, width // 2, 2, 3).mean(axis=(3, 5))
    return pooled.reshape(size, -1)


def mean_distance(points: np.ndarray) -> float:
    """Return the mean Euclidean distance over all pairs of rows of (S, D); unbiased in S, so sizes may differ."""
    norm = (points * points).sum(axis=1)
    squared = norm[:, None] + norm - 2.0 * points @ points.T
    upper = np.triu_indices(len(points), k=1)
    return float(np.sqrt(np.maximum(squared[upper], 0.0)).mean())


def _shared(scene: Scene, tracks: list[Track | None]) -> dict[str, float]:
    """Return the factors that objects share, or their mean over the objects found; `tracks` is one per object."""
    found = [track for track in tracks if track is not None]

    def mean(name: str, bounds: tuple[float, float]) -> float:
        return _unit(float(np.mean([getattr(track, name) for track in found])), bounds)

    values = {
        "radius": mean("radius", RADIUS_RANGE[scene.count]),
        "growth": mean("growth", GROWTH_RANGE[scene.count]),
        "fade": mean("fade", FADE_RANGE),
        "shade": mean("shade", SHADE_RANGE),
    }
    speeds, bends = [], []
    for track, (motion, word) in zip(tracks, scene.moves, strict=True):
        if track is not None and word is not None:
            along = np.array(DIRECTIONS[motion], dtype=float)
            speeds.append(_unit(float(np.array(track.velocity) @ along), SPEEDS[word]))
            bends.append(float(-along[1] * track.bow[0] + along[0] * track.bow[1]) / BEND_RANGE[1])
    if speeds:
        values |= {"speed": float(np.mean(speeds)), "bend": float(np.mean(bends))}
    return values


def _places(scene: Scene, tracks: list[Track]) -> dict[str, float]:
    """Return start positions relative to the room that size and path leave, as the law draws them."""
    if scene.count == 1:
        return {"place_x": _relative_place(scene, tracks[0], 0), "place_y": _relative_place(scene, tracks[0], 1)}
    if scene.relation is not None:
        across = 1 if RELATIONS[scene.relation][0] else 0
    else:
        gap = np.abs(np.subtract(tracks[0].start, tracks[1].start))
        across = 1 if gap[0] >= gap[1] else 0
    return {"offset1": _relative_place(scene, tracks[0], across), "offset2": _relative_place(scene, tracks[1], across)}


def _relative_place(scene: Scene, track: Track, axis: int) -> float:
    extent = track.radius * EXTENT.get(track.shape, 1.0) * (1.0 + max(track.growth, 0.0))
    path = np.zeros(3)
    if scene.speed:
        along = DIRECTIONS[scene.motion]
        aside = (-along[1], along[0])
        path[1] = along[axis] * track.speed * (NATIVE_NUM_FRAMES - 1)
        path[2] = aside[axis] * track.bend
    low = extent - path.min()
    room = WORLD_SIZE - 2 * extent - (path.max() - path.min())
    return float((track.start[axis] - low) / max(room, 4.0))


def _unit(value: float, bounds: tuple[float, float]) -> float:
    return (value - bounds[0]) / (bounds[1] - bounds[0])
