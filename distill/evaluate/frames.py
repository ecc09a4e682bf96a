"""Rank correlations between the frames of clips of one caption: how the picture at one moment goes with another.

Legend: S clips of one caption, T frames, H and W rows and columns, V coefficients, K frames that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

FRAME_STRIDE = 4
"""Of the frames, every fourth: as many as the VAE has latent frames."""
STRONG = 0.5
"""Correlations of the reference from which `frame_distance` takes `kept`; of 64 clips, noise alone gives .13."""
# Over the quadrants, in reading order: mean, left less right, top less bottom, diagonal.
_PATTERNS = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 4.0


@dataclass(frozen=True, slots=True)
class FrameDistance:
    """How the correlations of clips differ from those of a reference, means over captions.

    Attributes:
        frame_rho: mean error of the correlation between two frames, over patterns and pairs of frames; 0 is right.
        kept: regression slope on the reference's correlations, where those are strong; 1 is right, below it
            dependence between frames is lost, above it overstated.
    """

    frame_rho: float
    kept: float


def frame_correlations(clips: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation between frames, within each pattern: (12, K, K).

    A pattern is one of four Haar patterns of the frame's quadrants in one colour channel: the first is the channel's
    mean, which does not see motion that stays within the frame; the other three do.

    Args:
        clips: uint8 (S, T, H, W, 3) of one caption, 2 or more.
    """
    frames = clips[:, ::FRAME_STRIDE].astype(np.float32)
    size, num, height, width, _ = frames.shape
    quadrants = frames.reshape(size, num, 2, height // 2, 2, width // 2, 3).mean(axis=(3, 5))
    values = np.einsum("skqc,pq->pcsk", quadrants.reshape(size, num, 4, 3), _PATTERNS).reshape(-1, size, num)
    ranks = rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    ranks /= np.maximum(np.sqrt((ranks * ranks).sum(axis=1, keepdims=True)), 1e-9)
    correlations: np.ndarray = np.einsum("psk,psl->pkl", ranks, ranks)
    return correlations


def frame_distance(groups: list[np.ndarray], reference: list[np.ndarray]) -> FrameDistance:
    """Compare `frame_correlations` of clips and of a reference, given per caption."""
    upper = np.triu_indices(reference[0].shape[1], k=1)
    own, wanted = [np.stack(part)[:, :, upper[0], upper[1]] for part in (groups, reference)]
    strong = np.abs(wanted) > STRONG
    slope = (own * wanted)[strong].sum() / max(np.square(wanted[strong]).sum(), 1e-9)
    return FrameDistance(frame_rho=float(np.abs(own - wanted).mean()), kept=float(slope))
