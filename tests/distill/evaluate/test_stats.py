"""Clustered bootstrap intervals: coverage of a known mean, and what pairing buys."""

import numpy as np
import pytest

from codmd_serve.errors import ConfigError
from distill.evaluate.stats import clustered_mean, holm, paired_difference


def clustered_draw(rng: np.random.Generator, num_clusters: int = 40, per_cluster: int = 4) -> tuple:
    clusters = np.repeat(np.arange(num_clusters), per_cluster)
    values = np.repeat(rng.normal(0, 1, num_clusters), per_cluster) + rng.normal(0, 0.3, len(clusters))
    return values, clusters


def test_clustered_mean_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered, naive = [], []
    for draw in range(200):
        values, clusters = clustered_draw(rng)
        interval = clustered_mean(values, clusters, seed=draw, num_resamples=500)
        covered.append(interval.low <= 0.0 <= interval.high)
        by_clip = clustered_mean(values, np.arange(len(values)), seed=draw, num_resamples=500)
        naive.append(by_clip.low <= 0.0 <= by_clip.high)
    assert 0.88 <= np.mean(covered) <= 0.99
    assert np.mean(naive) < 0.8


def test_clustered_mean_equals_the_plain_mean_and_is_reproducible() -> None:
    values, clusters = clustered_draw(np.random.default_rng(1))
    values[3] = np.nan
    first, again = clustered_mean(values, clusters, seed=4), clustered_mean(values, clusters, seed=4)
    assert first == again
    assert first.mean == pytest.approx(np.nanmean(values))
    assert first.low < first.mean < first.high
    assert (first.num_values, first.num_clusters) == (159, 40)


def test_clustered_mean_of_nothing_is_nan() -> None:
    empty = clustered_mean(np.array([np.nan, np.nan]), np.array([0, 1]))
    assert np.isnan(empty.mean) and empty.num_values == 0
    assert empty.as_dict()["mean"] is None


def test_paired_difference_sees_what_unpaired_intervals_miss() -> None:
    rng = np.random.default_rng(2)
    values, clusters = clustered_draw(rng)
    better = values + 0.1 + rng.normal(0, 0.05, len(values))
    gap = paired_difference(better, values, clusters)
    assert gap.low > 0.0
    assert clustered_mean(better, clusters).low < clustered_mean(values, clusters).high


def test_paired_difference_refuses_unequal_lengths() -> None:
    with pytest.raises(ConfigError, match="one length"):
        paired_difference(np.zeros(3), np.zeros(4), np.zeros(3))
    with pytest.raises(ConfigError, match="one length"):
        clustered_mean(np.zeros(3), np.zeros(4))


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    with pytest.raises(ConfigError, match="p-values"):
        holm([float("nan")])
