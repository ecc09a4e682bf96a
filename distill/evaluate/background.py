"""The background of a clip: a sky and, below the horizon, a lighter floor; knows nothing of objects.

Legend: T frames, H and W rows and columns. Levels are 8-bit, rows are pixels from the top.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.worlds.shapeworld.render import HORIZON_LIFT, background_levels, background_rows
from distill.worlds.shapeworld.schema import BACKGROUNDS

UNCLEAR = "unclear"
_MIN_LIFT = 7.0
"""Least step, in levels per channel, that is taken for a horizon; the world's smallest is 19.5."""
_ROW_TOLERANCE = 12.0
_NAME_TOLERANCE = 25.0
_SHADE_BOUNDS = (0.6, 1.45)
_EVERY_FRAMES = 4
_SPLITS_TRIED = 8
_SPLIT_CAP = 60.0
"""Levels, summed over channels."""


@dataclass(frozen=True, slots=True, eq=False)
class Background:
    """A fitted background: sky, floor and horizon.

    Attributes:
        rows: float32 (H, 3), colour of each row.
        above, below: float32 (3,), median of sky and of floor; equal when there is no horizon.
        horizon_px: row coordinate of the step (0 top edge, H bottom edge); nan when there is none.
        name: one of BACKGROUNDS, or "unclear" when none is within 25 levels.
        shade: brightness factor of that palette colour.
    """

    rows: np.ndarray
    above: np.ndarray
    below: np.ndarray
    horizon_px: float
    name: str
    shade: float


def fit_background(planes: np.ndarray) -> Background:
    """Fit sky and floor by row medians over time and columns.

    A row that objects cover for more than half of its pixels has their colour as its median. Its other pixels then say
    whether it is sky or floor.

    Args:
        planes: float32 (3, T, H, W) in 8-bit levels. In most rows objects must cover less than half of the pixels.
    """
    sample = planes[:, ::_EVERY_FRAMES].transpose(2, 0, 1, 3).reshape(planes.shape[2], 3, -1)
    rows = np.median(sample, axis=2).astype(np.float32)
    fitted = _from_rows(rows)
    covered = np.nonzero(np.abs(rows - fitted.rows).max(axis=1) > 0.0)[0]
    if len(covered) == 0 or not np.isfinite(fitted.horizon_px):
        return fitted
    alike = [
        (np.abs(sample[covered] - level[:, None]).max(axis=1) < _ROW_TOLERANCE).sum(axis=1)
        for level in (fitted.above, fitted.below)
    ]
    rows[covered] = np.where((alike[0] > alike[1])[:, None], fitted.above, fitted.below)
    return _from_rows(rows)


def refine_background(first: Background, planes: np.ndarray, is_object: np.ndarray) -> Background:
    """Refit by the mean of the pixels outside objects, which is finer than a median of whole levels.

    Args:
        first: of `fit_background`; its rows stand in where a row is all object.
        planes: float32 (3, T, H, W).
        is_object: bool (T, H, W).
    """
    weight = (~is_object).astype(np.float32)
    num = weight.sum(axis=(0, 2))
    total = np.stack([np.einsum("thw,thw->h", plane, weight) for plane in planes], axis=1)
    rows = np.where((num > 0)[:, None], total / np.maximum(num, 1.0)[:, None], first.rows)
    return _from_rows(rows.astype(np.float32))


def world_rows(background: Background, height: int) -> np.ndarray:
    """Return the rows of the nearest background of the world, with a sharp horizon; float32 (H, 3)."""
    if background.name == UNCLEAR:
        return background.rows
    horizon_px = background.horizon_px if np.isfinite(background.horizon_px) else float(height)
    return background_rows(background.name, horizon_px, background.shade, height)


def _from_rows(rows: np.ndarray) -> Background:
    split = _split_row(rows.sum(axis=1))
    above, below = np.median(rows[:split], axis=0), np.median(rows[split:], axis=0)
    height = len(rows)
    if (below - above).mean() < _MIN_LIFT:
        above = below = np.median(rows, axis=0)
        horizon, share_below = np.nan, np.zeros(height, dtype=np.float32)
    else:
        horizon = _horizon(rows.sum(axis=1), float(above.sum()), float(below.sum()), split)
        share_below = np.clip(np.arange(height) + 1.0 - horizon, 0.0, 1.0)
    levels = background_levels(horizon if np.isfinite(horizon) else float(height), height)
    gradient = (levels - HORIZON_LIFT * share_below)[:, None].astype(np.float32)
    model = above + (below - above) * share_below[:, None] + gradient
    # A row that objects cover for more than half of its pixels has their colour as its median.
    is_model = np.abs(rows - model).max(axis=1) > _ROW_TOLERANCE
    rows = np.where(is_model[:, None], model, rows).astype(np.float32)
    name, shade = _name_and_shade(above, below, float(share_below.mean()))
    return Background(rows, above.astype(np.float32), below.astype(np.float32), float(horizon), name, shade)


def _split_row(brightness: np.ndarray) -> int:
    """Return the row index that best splits the rows in a darker and a lighter level, by capped absolute error.

    The cap lets rows that objects cover be wrong. Only the sharpest steps between rows are tried.
    """
    best, best_cost = len(brightness) // 2, np.inf
    for split in np.argsort(-np.abs(np.diff(brightness)), kind="stable")[:_SPLITS_TRIED] + 1:
        above, below = float(np.median(brightness[:split])), float(np.median(brightness[split:]))
        cost = float(np.minimum(np.abs(brightness[:split] - above), _SPLIT_CAP).sum())
        cost += float(np.minimum(np.abs(brightness[split:] - below), _SPLIT_CAP).sum())
        if below >= above and cost < best_cost:
            best, best_cost = int(split), cost
    return best


def _horizon(brightness: np.ndarray, above: float, below: float, split: int) -> float:
    """Return the horizon's row coordinate at sub-pixel precision; its row mixes both levels in proportion.

    Both gradients bring the rows next to the horizon closer together, by as much above as below.
    """
    low, high = max(split - 2, 0), min(split + 2, len(brightness))
    share_above = np.clip((below - brightness[low:high]) / (below - above), 0.0, 1.0)
    return low + float(share_above.sum())


def _name_and_shade(above: np.ndarray, below: np.ndarray, share_below: float) -> tuple[str, float]:
    levels = np.concatenate([above, below])
    weights = np.repeat([1.0 - share_below, share_below], 3) / 3.0
    best, best_error, best_shade = UNCLEAR, _NAME_TOLERANCE**2, 1.0
    for name, colour in BACKGROUNDS.items():
        base = np.array(colour, dtype=float)
        lift = HORIZON_LIFT if share_below > 0 else 0.0
        model = np.concatenate([base, base + lift])
        shade = float((weights * levels * model).sum() / (weights * model * model).sum())
        shade = min(max(shade, _SHADE_BOUNDS[0]), _SHADE_BOUNDS[1])
        error = float((weights * (levels - shade * model) ** 2).sum())
        if error < best_error:
            best, best_error, best_shade = name, error, shade
    return best, best_shade
