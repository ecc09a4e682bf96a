"""Intervals for votes that share raters and prompts: a two-way cluster bootstrap.

Votes of one rater resemble each other, and so do votes on one prompt. Raters and prompts are drawn anew, both with
replacement, and a vote counts as often as its rater times its prompt was drawn. That alone is too wide: the noise of a
single vote enters up to three times. So the spread of the draws is brought to the two-way cluster-robust variance,
V(raters) + V(prompts) - V(cells), each from a bootstrap of its own, and widened by Student's t for few clusters.

Source: Owen, "The pigeonhole bootstrap" (2007), for the draws and their bias; Cameron, Gelbach and Miller, "Robust
inference with multiway clustering" (2011), for the variance; Satterthwaite's formula for the degrees of freedom.

Legend: N votes, D draws, K values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import t as student_t

NUM_DRAWS = 2000
LEVEL_PERCENT = (2.5, 97.5)
MAX_WEIGHTS = 4_000_000
_NORMAL_97_5 = 1.959964

# Weights (D, N) of the votes -> values (D, K).
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval; low and high are nan where one rater and one prompt leave nothing to draw."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """Return JSON values; None for nan."""
        return {name: None if np.isnan(number) else float(number) for name, number in asdict(self).items()}

    def excludes(self, value: float) -> bool:
        """Whether the whole interval lies on one side of a value."""
        return bool(self.low > value or self.high < value)


def two_way_intervals(
    statistic: Statistic,
    raters: np.ndarray,
    prompts: np.ndarray,
    *,
    seed: int = 0,
    num_draws: int = NUM_DRAWS,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> list[Interval]:
    """Return the values of a statistic over all votes, with their intervals.

    Args:
        statistic: of weighted votes.
        raters, prompts: (N,) who cast the vote, and on which prompt; any labels.
        seed: of the draws.
        num_draws: D.
        bounds: what the values cannot leave.
    """
    rater, prompt = (np.unique(labels, return_inverse=True)[1] for labels in (raters, prompts))
    cell = np.unique(np.stack([rater, prompt]), axis=1, return_inverse=True)[1].ravel()
    value = statistic(np.ones((1, len(rater))))[0]
    rng = np.random.default_rng([seed, 5])
    num_raters, num_prompts, num_cells = (int(cluster.max()) + 1 for cluster in (rater, prompt, cell))
    of_rater, of_prompt, of_cell = (_counts(rng, size, num_draws) for size in (num_raters, num_prompts, num_cells))
    if num_raters == 1 and num_prompts == 1:
        return [Interval(float(each), float("nan"), float("nan")) for each in value]
    if num_raters == 1 or num_prompts == 1:
        ways = [(of_prompt, prompt)] if num_raters == 1 else [(of_rater, rater)]
        draws = _values(statistic, ways)
        variance, freedom = _variance(draws, ways), np.full(draws.shape[1], float(max(num_raters, num_prompts) - 1))
    else:
        ways = [(of_rater, rater), (of_prompt, prompt)]
        draws = _values(statistic, ways)
        one_way = [_variance(_values(statistic, [way]), [way]) for way in (*ways, (of_cell, cell))]
        # A variance below that of one way alone is an accident of few clusters.
        variance = np.maximum(one_way[0] + one_way[1] - one_way[2], np.maximum(one_way[0], one_way[1]))
        sizes = (num_raters, num_prompts, num_cells)
        spread = sum(part**2 / max(size - 1, 1) for part, size in zip(one_way, sizes, strict=True))
        freedom = np.maximum(np.divide(variance**2, spread, out=np.ones_like(variance), where=spread > 0), 1.0)
    return _scaled(value, draws, variance, freedom, bounds)


# How often each cluster was drawn, (D, clusters), and the cluster of each vote, (N,).
Way = tuple[np.ndarray, np.ndarray]


def _counts(rng: np.random.Generator, size: int, num_draws: int) -> np.ndarray:
    counts: np.ndarray = rng.multinomial(size, np.full(size, 1.0 / size), size=num_draws).astype(float)
    return counts


def _values(statistic: Statistic, ways: list[Way]) -> np.ndarray:
    """Return the statistic of every draw, (D, K); a few draws at a time, because weights are D times N numbers."""
    num_draws, num_votes = len(ways[0][0]), len(ways[0][1])
    chunk = max(1, MAX_WEIGHTS // num_votes)
    values = []
    for start in range(0, num_draws, chunk):
        weights = np.ones((1, num_votes))
        for counts, cluster in ways:
            weights = weights * counts[start : start + chunk][:, cluster]
        # A draw that meets no vote at all, in a study where raters see few prompts, is no draw.
        values.append(statistic(weights[weights.sum(axis=1) > 0]))
    return np.concatenate(values)


def _variance(values: np.ndarray, ways: list[Way]) -> np.ndarray:
    size = ways[0][0].shape[1]
    variance: np.ndarray = np.nanvar(values, axis=0) * (size / max(size - 1, 1))
    return variance


def _scaled(
    value: np.ndarray, draws: np.ndarray, variance: np.ndarray, freedom: np.ndarray, bounds: tuple[float, float]
) -> list[Interval]:
    low, high = np.nanpercentile(draws, LEVEL_PERCENT, axis=0)
    deviation = np.nanstd(draws, axis=0)
    scale = np.divide(np.sqrt(variance), deviation, out=np.ones_like(variance), where=deviation > 0)
    scale = scale * student_t.ppf(0.975, freedom) / _NORMAL_97_5
    lows = np.clip(value + (low - value) * scale, *bounds)
    highs = np.clip(value + (high - value) * scale, *bounds)
    return [Interval(float(a), float(b), float(c)) for a, b, c in zip(value, lows, highs, strict=True)]
