"""Paired comparison of two arms that were sampled from one plan: bootstrap over prompts, Holm over dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codmd_serve.errors import ConfigError
from distill.evaluate.stats import holm
from distill.evaluate.vbench.check import listed
from distill.evaluate.vbench.facts import DIMENSIONS, missing_dimensions
from distill.evaluate.vbench.results import DimensionResult, clustered, strata
from distill.evaluate.vbench.score import TOTALS, prompt_weights, resampled_mean, total_draws, totals

LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Difference:
    """First arm minus second, in points of raw score, or of a total.

    Attributes:
        name: a dimension, or quality, semantic, total.
        first, second: the arms' values, in percent.
        low, high: 95% interval of the difference over prompts.
        p: two-sided, of the bootstrap; its smallest value is 2 / (resamples + 1).
        p_holm: the same, adjusted for the number of dimensions; totals are adjusted among themselves.
        num_prompts: that the difference rests on.
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    p: float
    p_holm: float
    num_prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether it holds after Holm at 5%."""
        return self.p_holm < LEVEL


def compare(
    first: Mapping[str, DimensionResult], second: Mapping[str, DimensionResult], seed: int = 0
) -> list[Difference]:
    """Return the differences of all dimensions, and of the totals where there are 16.

    Args:
        first, second: results of arms that scored the same videos' prompts and samples, by dimension.
        seed: of the bootstrap.

    Raises:
        ConfigError: dimensions, prompts, samples, plans or evaluators that one arm has and the other lacks.
    """
    _check_pair(first, second)
    names = [name for name in DIMENSIONS if name in first]
    weights = prompt_weights(strata(first), seed)
    sums = [clustered(arm) for arm in (first, second)]
    means = [{name: resampled_mean(arm[name], weights) for name in names} for arm in sums]
    points = [{name: point for name, (point, _) in arm.items()} for arm in means]
    draws = [{name: drawn for name, (_, drawn) in arm.items()} for arm in means]
    rows = []
    for name in names:
        gap = 100.0 * (draws[0][name] - draws[1][name])
        rows.append((name, 100.0 * points[0][name], 100.0 * points[1][name], gap, len(sums[0][name])))
    differences = _finish(rows)
    if len(names) == len(DIMENSIONS):
        wholes, drawn = [totals(arm) for arm in points], [total_draws(arm) for arm in draws]
        differences += _finish(
            [(name, wholes[0][name], wholes[1][name], drawn[0][name] - drawn[1][name], len(weights)) for name in TOTALS]
        )
    return differences


def _finish(rows: list[tuple[str, float, float, np.ndarray, int]]) -> list[Difference]:
    ps = [_p_value(gap) for _, _, _, gap, _ in rows]
    differences = []
    for (name, first, second, gap, num), p, adjusted in zip(rows, ps, holm(ps), strict=True):
        low, high = np.percentile(gap, [2.5, 97.5])
        differences.append(Difference(name, first, second, float(low), float(high), p, adjusted, num))
    return differences


def _p_value(gap: np.ndarray) -> float:
    """Return twice the share of resamples on the far side of 0, that of no difference counted on both sides."""
    tail = min(int((gap <= 0).sum()), int((gap >= 0).sum()))
    return min(1.0, 2.0 * (tail + 1) / (len(gap) + 1))


def _check_pair(first: Mapping[str, DimensionResult], second: Mapping[str, DimensionResult]) -> None:
    for one, other, which in ((first, second, "second"), (second, first, "first")):
        missing = missing_dimensions(set(other), tuple(one))
        if missing:
            raise ConfigError(f"the {which} arm lacks {', '.join(missing)}: compare arms with the same dimensions")
    for name in first:
        a, b = first[name], second[name]
        if not a.videos or not b.videos:
            raise ConfigError(f"{name}: a paired comparison needs the scores of single videos")
        keys = [{(video.prompt, video.sample) for video in result.videos} for result in (a, b)]
        unpaired = sorted(f"{sample} of {prompt!r}" for prompt, sample in keys[0] ^ keys[1])
        if unpaired:
            raise ConfigError(f"{name}: {len(unpaired)} videos are in one arm alone: {listed(unpaired)}")
        if a.plan_sha256 != b.plan_sha256:
            raise ConfigError(f"{name}: the arms were sampled from two plans, so prompts and noise differ")
        keys_of_either = sorted(a.evaluator.keys() | b.evaluator.keys())
        differing = [key for key in keys_of_either if a.evaluator.get(key) != b.evaluator.get(key)]
        if differing:
            raise ConfigError(
                f"{name}: the arms were scored with two evaluators; they differ in {', '.join(differing)}"
            )
