"""Paired comparison: what it finds, what it does not, and pairs that are none."""

from dataclasses import replace

import numpy as np
import pytest
from vbench_cases import result_of

from codmd_serve.errors import ConfigError
from distill.evaluate.vbench.compare import compare
from distill.evaluate.vbench.facts import DIMENSIONS
from distill.evaluate.vbench.results import DimensionResult


def arm(
    seed: int, shift: float = 0.0, names: tuple[str, ...] = ("scene", "color"), num: int = 40
) -> dict[str, DimensionResult]:
    """Scores whose prompts differ much and whose arms differ by `shift` and a little noise."""
    own = np.random.default_rng(seed)
    results = {}
    for place, name in enumerate(names):
        difficulty = np.random.default_rng(place).uniform(0.2, 0.7, num)
        scores = [[float(base + shift + own.normal(0, 0.01)) for _ in range(2)] for base in difficulty]
        results[name] = result_of(name, scores)
    return results


def test_compare_finds_a_small_paired_difference_that_unpaired_intervals_hide() -> None:
    rows = compare(arm(1, shift=0.02), arm(2))
    for row in rows:
        assert row.first - row.second == pytest.approx(2.0, abs=0.5)
        assert row.low > 1.0 and row.high < 3.0 and row.is_clear and row.num_prompts == 40


def test_compare_of_an_arm_with_itself_finds_nothing() -> None:
    for row in compare(arm(1), arm(1)):
        assert (row.low, row.high, row.p, row.p_holm) == (0.0, 0.0, 1.0, 1.0) and not row.is_clear


def test_compare_seldom_finds_what_is_not_there() -> None:
    found = [row.p < 0.05 for seed in range(60) for row in compare(arm(2 * seed, num=30), arm(2 * seed + 1, num=30))]
    assert np.mean(found) < 0.12


def test_compare_counts_a_failed_video_as_zero() -> None:
    first = {"scene": result_of("scene", [[0.5, 0.5], [0.5, 0.5]])}
    second = {"scene": result_of("scene", [[0.5, None], [0.5, 0.5]])}
    (row,) = compare(first, second)
    assert (row.first, row.second) == pytest.approx((50.0, 37.5))


def test_compare_adds_totals_where_all_dimensions_are_there() -> None:
    names = tuple(DIMENSIONS)
    rows = compare(arm(1, shift=0.02, names=names), arm(2, names=names))
    assert [row.name for row in rows[-3:]] == ["quality", "semantic", "total"] and len(rows) == 19
    assert rows[-1].is_clear and rows[-1].low > 0
    # The total's difference is that of its parts, 4 to 1.
    gaps = [row.first - row.second for row in rows[-3:]]
    assert gaps[2] == pytest.approx((4 * gaps[0] + gaps[1]) / 5)


def test_compare_refuses_arms_that_are_no_pair() -> None:
    first = arm(1)
    cases: list[tuple[dict[str, DimensionResult], str]] = [
        ({"scene": first["scene"]}, "the second arm lacks color"),
        ({**first, "human_action": result_of("human_action", [[1.0]])}, "the first arm lacks human_action"),
        ({**first, "scene": result_of("scene", [[0.5]] * 40)}, "40 videos are in one arm alone: 1 of 'prompt 0'"),
        ({**first, "scene": replace(first["scene"], plan_sha256="other")}, "two plans"),
        ({**first, "scene": replace(first["scene"], evaluator={"torch": "2"})}, "differ in torch"),
        ({**first, "scene": replace(first["scene"], videos=[])}, "needs the scores of single videos"),
    ]
    for second, message in cases:
        with pytest.raises(ConfigError, match=message):
            compare(first, second)
