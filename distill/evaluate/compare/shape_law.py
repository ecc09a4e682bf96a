"""The law of what captions leave open, as clips show it, and the distance of two such laws; samples nothing.

Legend: S clips of one caption, F factors, K frames that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from distill.evaluate.frames import frame_correlations, frame_distance
from distill.evaluate.joint import FACTORS, dependence_distance, marginal_distances, pair_taus, pixel_points


@dataclass(frozen=True, slots=True)
class Law:
    """Samples of the law, per caption.

    Attributes:
        factors: (S, F) each, nan columns for factors that the caption does not have.
        frames: `frame_correlations` each.
    """

    factors: tuple[np.ndarray, ...]
    frames: tuple[np.ndarray, ...]


def law_of(factors: Sequence[np.ndarray], clips: Sequence[np.ndarray]) -> Law:
    """Return the law that some clips show, given per caption with their factors."""
    return Law(tuple(factors), tuple(frame_correlations(own) for own in clips))


def distances(law: Law, reference: Law) -> dict[str, Any]:
    """Return how far a law is from a reference.

    Returns:
        tau_err: mean error of Kendall's tau of the tied pairs, 0 is right. tau_kept: regression slope of these on the
        reference's, 1 is right, below it dependence is lost. taus: of the pairs that the captions have. w1: mean
        Wasserstein distance of the factors, in standard deviations of the reference. sd_ratio: mean ratio of standard
        deviations. frame_rho, kept: of `FrameDistance`. kept_err: |kept - 1|.
    """
    taus, wanted = pair_taus(list(law.factors)), pair_taus(list(reference.factors))
    known = ~np.isnan(taus[0]) & ~np.isnan(wanted[0])
    slope = (taus[0] * wanted[0])[known].sum() / max(float(np.square(wanted[0][known]).sum()), 1e-9)
    pairs = list(zip(law.factors, reference.factors, strict=True))
    frames = frame_distance(list(law.frames), list(reference.frames))
    return {
        "tau_err": float(dependence_distance(taus, wanted)[0]),
        "tau_kept": float(slope),
        "taus": [float(tau) for tau in taus[0][known]],
        "w1": float(np.mean([np.nanmean(marginal_distances(own, other)) for own, other in pairs])),
        "sd_ratio": float(np.mean([_spread_ratio(own, other) for own, other in pairs])),
        "frame_rho": frames.frame_rho,
        "kept": frames.kept,
        "kept_err": abs(frames.kept - 1.0),
    }


def matrices(law: Law) -> dict[str, list[list[float]]]:
    """Return the dependence within a law, means over captions.

    Returns:
        tau: Kendall's, between the factors that every caption has. rho, (K, K): Spearman's between frames, mean over
        patterns.
    """
    shared = [place for place in range(len(FACTORS)) if not any(np.isnan(own[:, place]).any() for own in law.factors)]
    taus: np.ndarray = np.mean([_tau_matrix(own[:, shared]) for own in law.factors], axis=0)
    rho: np.ndarray = np.mean([own.mean(axis=0) for own in law.frames], axis=0)
    return {name: [[round(float(x), 4) for x in row] for row in own] for name, own in (("tau", taus), ("rho", rho))}


def copying(clips: Sequence[np.ndarray], teacher: Sequence[np.ndarray]) -> float:
    """Return the mean correlation of what student and teacher make of the same noise, within captions.

    Args:
        clips, teacher: per caption uint8 (S, T, H, W, 3); clip s of both began with the same noise.

    Returns:
        1 where the student repeats the teacher's own pairing of noise and clip, 0 where it pairs them freely.
    """
    values = []
    for own, other in zip(clips, teacher, strict=True):
        first, second = (points - points.mean(axis=0) for points in (pixel_points(own), pixel_points(other)))
        size = np.sqrt(float(np.square(first).sum()) * float(np.square(second).sum()))
        values.append(float((first * second).sum()) / max(size, 1e-9))
    return float(np.mean(values))


def _spread_ratio(own: np.ndarray, reference: np.ndarray) -> float:
    known = ~np.isnan(reference).any(axis=0) & ~np.isnan(own).any(axis=0)
    ratio = own[:, known].std(axis=0) / np.maximum(reference[:, known].std(axis=0), 1e-3)
    return float(ratio.mean())


def _tau_matrix(values: np.ndarray) -> np.ndarray:
    size = values.shape[1]
    matrix = np.eye(size)
    for first in range(size):
        for second in range(first):
            tau = kendalltau(values[:, first], values[:, second]).statistic
            matrix[first, second] = matrix[second, first] = 0.0 if np.isnan(tau) else tau
    return matrix
