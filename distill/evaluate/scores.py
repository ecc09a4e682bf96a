"""Scores one clip against its caption's scene: caption following and video quality.

Knows scenes and detections; knows neither latents nor how a clip was made. A score that has no meaning for a caption
(speed of something still, an unsaid relation) is nan. Missing objects lower scores, they never raise an error.

Legend: T frames, H and W rows and columns.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from distill.evaluate.background import world_rows
from distill.evaluate.detect import Detection, Track, relation_holds
from distill.evaluate.form import FORM_SCORES, form_scores
from distill.worlds.shapeworld.render import paint
from distill.worlds.shapeworld.schema import COLOURS, SHAPES, STILL, WORLD_SIZE, Scene

CAPTION_SCORES = ("object", "colour", "object_colour", "count", "direction", "speed", "background", "relation", "all")
"""1 right, 0 wrong, nan when the caption does not say; higher is better."""
VIDEO_SCORES = ("flicker", "smoothness", "dynamic", "imaging", "saturation", "saturation_abs")
"""flicker in 8-bit levels, lower is better; smoothness and imaging at most 1, higher is better; dynamic against the
ground truth's; saturation signed, 0 is right; saturation_abs, lower is better."""
SCORES = CAPTION_SCORES + VIDEO_SCORES + FORM_SCORES
_MIN_STATIC_SHARE = 0.02


def pair_objects(scene: Scene, detection: Detection) -> list[Track | None]:
    """Match each stated object to its best track: by colour, then shape, then size."""
    candidates: list[Track | None] = [*detection.tracks[:5], *[None] * scene.count]
    best: tuple[Track | None, ...] = (None,) * scene.count
    best_fit = 0
    for chosen in permutations(candidates, scene.count):
        fit = 0
        for (colour, shape), track in zip(scene.objects, chosen, strict=True):
            if track is not None:
                fit += 1 + 4 * (track.colour == colour) + 2 * (track.shape == shape)
        if fit > best_fit:
            best, best_fit = chosen, fit
    return list(best)


def score_clip(scene: Scene, detection: Detection, clip: np.ndarray) -> dict[str, float]:
    """Return every score of SCORES.

    Args:
        scene: what the caption says.
        detection: of `clip`.
        clip: uint8 (T, H, W, 3).
    """
    tracks = pair_objects(scene, detection)
    looks = video_scores(scene, detection, tracks, clip) | form_scores(detection, tracks, clip)
    return caption_scores(scene, detection, tracks) | looks


def caption_scores(scene: Scene, detection: Detection, tracks: list[Track | None]) -> dict[str, float]:
    """Return CAPTION_SCORES; `tracks` is one per stated object, None for one that was not found."""
    found = [track for track in tracks if track is not None]
    is_complete = len(found) == scene.count
    shapes = is_complete and all(t.shape == shape for t, (_, shape) in zip(found, scene.objects, strict=True))
    colours = is_complete and all(t.colour == colour for t, (colour, _) in zip(found, scene.objects, strict=True))
    right: dict[str, bool | None] = {
        "object": shapes,
        "colour": colours,
        "object_colour": shapes and colours,
        "count": detection.count == scene.count,
        "direction": is_complete and all(t.motion == motion for t, (motion, _) in zip(found, scene.moves, strict=True)),
        "speed": None,
        "background": detection.background.name == scene.background,
        "relation": None,
    }
    if any(word is not None for _, word in scene.moves):
        right["speed"] = is_complete and all(
            word in (None, t.speed_word) for t, (_, word) in zip(found, scene.moves, strict=True)
        )
    if scene.relation is not None:
        right["relation"] = is_complete and relation_holds(scene.relation, found[0], found[1])
    right["all"] = all(value for value in right.values() if value is not None)
    return {name: float("nan") if right[name] is None else float(bool(right[name])) for name in CAPTION_SCORES}


def video_scores(scene: Scene, detection: Detection, tracks: list[Track | None], clip: np.ndarray) -> dict[str, float]:
    """Return VIDEO_SCORES; without any object the saturation errors are nan, smoothness, dynamic and imaging 0."""
    errors = [
        saturation(track.paint) - saturation(np.array(COLOURS[colour], dtype=float))
        for track, (colour, _) in zip(tracks, scene.objects, strict=True)
        if track is not None
    ]
    moving = [track.motion != STILL for track in detection.tracks]
    return {
        "flicker": flicker(clip, detection.foreground),
        "smoothness": float(np.mean([smoothness(track) for track in detection.tracks])) if detection.tracks else 0.0,
        "dynamic": float(np.mean(moving)) if moving else 0.0,
        "imaging": imaging_quality(clip, detection),
        "saturation": float(np.mean(errors)) if errors else float("nan"),
        "saturation_abs": float(np.mean(np.abs(errors))) if errors else float("nan"),
    }


def flicker(clip: np.ndarray, foreground: np.ndarray) -> float:
    """Return the mean absolute difference of successive frames on shared background, in 8-bit levels; nan if none."""
    static = ~(foreground[1:] | foreground[:-1])
    if static.mean() < _MIN_STATIC_SHARE:
        return float("nan")
    change = np.maximum(clip[1:], clip[:-1]) - np.minimum(clip[1:], clip[:-1])
    total = sum(int((change[..., channel] * static).sum()) for channel in range(3))
    return total / (3.0 * float(static.sum()))


def smoothness(track: Track) -> float:
    """Return 1 minus the mean length of the centre's second time difference, each capped at 1 world unit.

    A moment at which the object was not seen counts as a full unit. The world's bowed paths score about 0.87 when
    they move, 1 when still.
    """
    second = np.diff(track.centres, n=2, axis=0)
    length = np.minimum(np.hypot(second[:, 0], second[:, 1]), 1.0)
    return 1.0 - float(np.where(np.isnan(length), 1.0, length).mean())


def saturation(colour: np.ndarray) -> float:
    """Return (max - min) / max of an RGB colour, which does not depend on brightness, shade or fade."""
    low, high = np.clip([float(colour.min()), float(colour.max())], 0.0, 255.0).tolist()
    return float((high - low) / high) if high >= 1.0 else 0.0


def reconstruct(detection: Detection, height: int, width: int) -> np.ndarray:
    """Render the detection as the world would: palette colours, its light, sharp edges; uint8 (T, H, W, 3)."""
    rows = np.clip(np.rint(world_rows(detection.background, height)), 0, 255).astype(np.uint8)
    frames = np.empty((len(detection.foreground), height, width, 3), dtype=np.uint8)
    frames[:] = np.repeat(rows[:, None, :], width, axis=1)
    scale = min(height, width) / WORLD_SIZE
    for track in detection.tracks:
        seen = np.nonzero(track.seen)[0]
        drawn = frames[seen]
        shape = track.shape if track.shape in SHAPES else "circle"
        light = np.clip(track.lights[seen], 0.4, 1.05)
        paint(
            drawn, shape, np.array(COLOURS[track.colour]), track.centres[seen] * scale, track.radii[seen] * scale, light
        )
        frames[seen] = drawn
    return frames


def imaging_quality(clip: np.ndarray, detection: Detection) -> float:
    """Compare the clip's edges with the best-fitting render's: 2<g, r> / (|g|^2 + |r|^2), at least 0.

    g and r are the spatial gradients of clip and render. Blur shortens g, noise and mush add to it, a wrong colour or
    a missing object takes from r: each lowers the score; 1 is a clip the world could have drawn. 0 without objects.
    """
    if not detection.tracks:
        return 0.0
    shared = energy = 0.0
    for shown, drawn in zip(clip, reconstruct(detection, *clip.shape[1:3]), strict=True):
        for axis in (0, 1):
            g, r = (np.diff(frame.astype(np.float32), axis=axis) for frame in (shown, drawn))
            shared += float(np.vdot(g, r))
            energy += float(np.vdot(g, g)) + float(np.vdot(r, r))
    return max(0.0, 2.0 * shared / max(energy, 1e-6))
