"""Scores the form of objects: overlap of every object with the ideal shape fitted to it.

Catches what caption scores miss: an octagon that counts as a circle, or a torn ring that counts as a ring.

Legend: T frames, H and W rows and columns, N frames an object was seen in, P and Q rows and columns of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.evaluate.background import world_rows
from distill.evaluate.detect import Detection, Track
from distill.worlds.shapeworld.render import coverage, frame_windows, volume
from distill.worlds.shapeworld.schema import COLOURS, SHAPES, WORLD_SIZE

FORM_SCORES = ("form", "form_worst", "form_whole")
"""Overlap of a clip's mean frame and of its worst one, and whether the worst keeps WHOLE; objects count alike."""
WHOLE = 0.75
"""A worst frame of less is a shape that a person calls wrong."""
_REACH = 1.8
"""Radii about an object's centre in which stray pixels of its colour count against it."""


def form_scores(detection: Detection, tracks: Sequence[Track | None], clip: np.ndarray) -> dict[str, float]:
    """Return FORM_SCORES, each in [0, 1], higher is better.

    Args:
        detection: of `clip`.
        tracks: one per stated object, None for one that was not found, which overlaps nothing.
        clip: uint8 (T, H, W, 3).
    """
    by_object = [np.zeros(len(clip)) if track is None else track_overlap(track, detection, clip) for track in tracks]
    by_frame = np.mean(by_object, axis=0)
    worst = float(by_frame.min())
    return {"form": float(by_frame.mean()), "form_worst": worst, "form_whole": float(worst >= WHOLE)}


def track_overlap(track: Track, detection: Detection, clip: np.ndarray) -> np.ndarray:
    """Return the IoU of an object's pixels with its fitted shape, float (T,); 0 where it is not seen.

    A pixel is the object's when it shows more than half of the object's colour, as lit, over the background, and no
    other object is nearer, in radii.
    """
    overlap = np.zeros(len(clip))
    if track.shape not in SHAPES:
        return overlap
    height, width = clip.shape[1:3]
    scale = min(height, width) / WORLD_SIZE
    seen = np.nonzero(track.seen)[0]
    centre, radius = track.centres[seen] * scale, np.maximum(track.radii[seen] * scale, 0.5)
    windows, dx, dy = frame_windows(centre, _REACH * float(radius.max()) + 2.0, height, width)
    size = radius.astype(np.float32)[:, None, None]
    distance = np.hypot(dx, dy)
    is_near = distance < _REACH * size + 2.0
    for other in detection.tracks:
        if other is not track:
            gap = (other.centres[seen] - track.centres[seen]) * scale
            other_size = np.maximum(other.radii[seen] * scale, 0.5).astype(np.float32)[:, None, None]
            away = np.hypot(dx - gap[:, 0, None, None], dy - gap[:, 1, None, None])
            is_near &= ~(away / other_size < distance / size)  # nan, where the other is not seen, compares false
    light = np.clip(track.lights[seen], 0.4, 1.05).astype(np.float32)[:, None, None] * volume(dx, dy, size)
    background = world_rows(detection.background, height)
    towards = norm = np.float32(0.0)
    for channel, level in enumerate(COLOURS[track.colour]):
        below = np.stack([background[rows, channel] for _, rows, _ in windows])[:, :, None]
        shown = np.stack([clip[seen[at], rows, columns, channel] for at, rows, columns in windows])
        step = light * np.float32(level) - below
        towards = towards + (shown - below) * step
        norm = norm + step * step
    is_object = (towards > 0.5 * np.maximum(norm, 1.0)) & is_near
    is_ideal = coverage(track.shape, dx, dy, size, 1.0) > 0.5
    either = (is_object | is_ideal).sum(axis=(1, 2))
    overlap[seen] = (is_object & is_ideal).sum(axis=(1, 2)) / np.maximum(either, 1)
    return overlap
