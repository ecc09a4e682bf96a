"""Bootstrap means and intervals, clustered by caption.

Clips of one caption share its difficulty, so resampling clips instead of captions gives intervals that are too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from codmd_serve.errors import ConfigError

NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its percentile bootstrap interval.

    Attributes:
        mean: over all values; nan when there is none.
        low, high: 2.5% and 97.5% points over resampled captions.
        sd: standard deviation over resampled captions.
        num_values, num_clusters: what it rests on.
    """

    mean: float
    low: float
    high: float
    sd: float
    num_values: int
    num_clusters: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return JSON values; None for nan."""
        return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in asdict(self).items()}


@lru_cache(maxsize=16)
def resample_counts(num_clusters: int, seed: int, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """Return how often each cluster is drawn in each resample: float (R, K), rows sum to K."""
    rng = np.random.default_rng(seed)
    share = np.full(num_clusters, 1.0 / num_clusters)
    counts = rng.multinomial(num_clusters, share, size=num_resamples).astype(float)
    counts.setflags(write=False)  # shared by every caller
    return counts


def clustered_mean(
    values: np.ndarray, clusters: np.ndarray, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Return the mean of values with a 95% interval by resampling clusters.

    Args:
        values: float (N,); nan entries are left out.
        clusters: int (N,), for example caption indices.
        seed: of the resampling.
        num_resamples: R.

    Raises:
        ConfigError: shapes that differ.
    """
    values, clusters = np.asarray(values, dtype=float), np.asarray(clusters)
    if values.ndim != 1 or values.shape != clusters.shape:
        raise ConfigError(f"values and clusters must be of one length, got {values.shape} and {clusters.shape}")
    kept = ~np.isnan(values)
    names, index = np.unique(clusters[kept], return_inverse=True)
    if len(names) == 0:
        return Interval(float("nan"), float("nan"), float("nan"), float("nan"), 0, 0)
    sums, counts = np.bincount(index, weights=values[kept]), np.bincount(index)
    draws = resample_counts(len(names), seed, num_resamples)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(values[kept].mean())
    return Interval(mean, float(low), float(high), float(means.std()), int(kept.sum()), len(names))


def paired_difference(
    first: np.ndarray, second: np.ndarray, clusters: np.ndarray, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Return the mean of first - second, same clips in the same order, with its interval; nan in either is left out."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape:
        raise ConfigError(f"paired values must be of one length, got {first.shape} and {second.shape}")
    return clustered_mean(first - second, clusters, seed, num_resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down rule, in the order given.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979): the k-th smallest of m is multiplied by m - k + 1, and
    none becomes smaller than the one before it.

    Raises:
        ConfigError: a value that is no probability.
    """
    if any(not 0.0 <= p <= 1.0 for p in p_values):
        raise ConfigError(f"p-values must be in 0..1, got {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
