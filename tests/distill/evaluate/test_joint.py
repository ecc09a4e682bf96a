"""Margins, dependences and spread: right on the world itself, and each kind of damage seen by its own metric."""

import math

import numpy as np
import pytest
from scipy import stats

from distill.evaluate.detect import detect
from distill.evaluate.joint import (
    FACTORS,
    TIED_PAIRS,
    bend_coverage,
    dependence_distance,
    factor_spread,
    marginal_distances,
    mean_distance,
    measure_factors,
    pair_taus,
    pixel_points,
)
from distill.worlds.shapeworld.captions import parse_caption
from distill.worlds.shapeworld.law import RHO
from distill.worlds.shapeworld.render import sample_clip

ONE = "a red circle moves right quickly on a black background"
TWO = "a green square above a purple ring moves left slowly on a teal background"
NUM = 48


def draw_clips(caption: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([sample_clip(parse_caption(caption), rng) for _ in range(NUM)])


def factors_of(caption: str, clips: np.ndarray) -> np.ndarray:
    scene = parse_caption(caption)
    return np.stack([measure_factors(scene, detect(clip)) for clip in clips])


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    return {caption: draw_clips(caption, 3) for caption in (ONE, TWO)}


@pytest.fixture(scope="module")
def truth(clips: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {caption: factors_of(caption, clips[caption]) for caption in clips}


@pytest.fixture(scope="module")
def other(clips: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {caption: factors_of(caption, draw_clips(caption, 4)) for caption in clips}


def test_measure_factors_of_renders_are_uniform_in_their_ranges(truth: dict[str, np.ndarray]) -> None:
    for caption, missing in ((ONE, ("offset1", "offset2")), (TWO, ("place_x", "place_y"))):
        for name, column in zip(FACTORS, truth[caption].T, strict=True):
            if name in missing:
                assert np.isnan(column).all()
            elif name == "bend":
                assert (np.abs(column) > 0.4).all() and (np.abs(column) < 1.05).all()
            else:
                assert column.min() > -0.1 and column.max() < 1.1, name
                if caption == ONE or name != "radius":  # of two objects it is a mean, which is not uniform
                    assert stats.kstest(column, "uniform").pvalue > 1e-4, name


def test_pair_taus_recover_the_law(truth: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    groups = [np.concatenate([truth[caption], other[caption]]) for caption in truth]
    taus = dict(zip(TIED_PAIRS, pair_taus(groups)[0], strict=True))
    for pair, rho in RHO.items():
        # Means over two objects are tied a little tighter than one object is.
        assert taus[pair] == pytest.approx(2 / math.pi * math.asin(rho), abs=0.13), pair


def test_pair_taus_equal_scipy_and_weights_equal_repeats() -> None:
    rng = np.random.default_rng(0)
    factors = rng.random((30, len(FACTORS)))
    first = [stats.kendalltau(*(factors[:, FACTORS.index(name)] for name in pair)).statistic for pair in TIED_PAIRS]
    assert pair_taus([factors])[0] == pytest.approx(first)
    counts = rng.multinomial(30, np.full(30, 1 / 30), size=1).astype(float)
    repeated = np.repeat(factors, counts[0].astype(int), axis=0)
    same = counts[0] @ counts[0]
    expected = pair_taus([repeated])[0] * (30 * 30 - 30) / (30 * 30 - same)
    assert pair_taus([factors], [counts])[0] == pytest.approx(expected)


def test_truth_against_truth_is_near_the_floor(truth: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for caption in truth:
        # Two samples of 48 uniform values are 0.22 standard deviations apart on average.
        assert np.nanmean(marginal_distances(other[caption], truth[caption])) < 0.32
        assert factor_spread(other[caption], truth[caption]) == pytest.approx(1.0, abs=0.12)
    taus, taus_other = (pair_taus(list(groups.values())) for groups in (truth, other))
    assert dependence_distance(taus_other, taus)[0] < 0.15
    assert bend_coverage(truth[ONE]) > 0.7


def test_shuffling_factors_moves_dependence_and_not_margins(truth: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    shuffled = {c: np.stack([rng.permutation(column) for column in f.T], axis=1) for c, f in truth.items()}
    for caption in truth:
        assert np.nanmean(marginal_distances(shuffled[caption], truth[caption])) == pytest.approx(0.0, abs=1e-9)
    taus, broken = (pair_taus(list(groups.values())) for groups in (truth, shuffled))
    assert dependence_distance(broken, taus)[0] > 0.4


def test_shuffling_the_last_frames_across_samples_moves_dependence(
    clips: dict[str, np.ndarray], truth: dict[str, np.ndarray]
) -> None:
    mixed = clips[ONE].copy()
    mixed[:, 9:] = np.roll(clips[ONE], 1, axis=0)[:, 9:]
    found = factors_of(ONE, mixed)
    distance = dependence_distance(pair_taus([found]), pair_taus([truth[ONE]]))[0]
    assert distance > 0.15
    for frame in (0, 16):  # every frame's own distribution is untouched
        assert sorted(map(bytes, mixed[:, frame])) == sorted(map(bytes, clips[ONE][:, frame]))


def test_a_darker_world_moves_margins_and_not_dependence(
    clips: dict[str, np.ndarray], truth: dict[str, np.ndarray]
) -> None:
    darker = factors_of(ONE, np.rint(clips[ONE] * 0.9).astype(np.uint8))
    distances = dict(zip(FACTORS, marginal_distances(darker, truth[ONE]), strict=True))
    assert distances["shade"] > 1.0
    assert distances["speed"] < 0.1
    assert dependence_distance(pair_taus([darker]), pair_taus([truth[ONE]]))[0] < 0.1


def test_mode_collapse_is_seen_by_diversity(clips: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> None:
    collapsed = np.resize(np.arange(3), NUM)
    assert factor_spread(truth[ONE][collapsed], truth[ONE]) < 0.8
    assert factor_spread(truth[ONE][:1].repeat(NUM, axis=0), truth[ONE]) == pytest.approx(0.0, abs=1e-3)
    points = pixel_points(clips[ONE])
    assert mean_distance(points[collapsed]) < 0.85 * mean_distance(points)
    one_sided = truth[ONE][truth[ONE][:, FACTORS.index("bend")] > 0]
    assert bend_coverage(one_sided) == 0.0


def test_factors_of_nothing_count_as_far_away(truth: dict[str, np.ndarray]) -> None:
    nothing = measure_factors(parse_caption(ONE), detect(np.full((17, 64, 64, 3), 10, dtype=np.uint8)))
    assert nothing[FACTORS.index("radius")] == -0.5
    assert np.isnan(nothing[FACTORS.index("offset1")])
    assert np.nanmean(marginal_distances(nothing[None].repeat(8, axis=0), truth[ONE])) > 2.0
    assert dependence_distance(pair_taus([nothing[None].repeat(8, axis=0)]), pair_taus([truth[ONE]]))[0] > 0.4


def test_mean_distance_equals_all_pairs() -> None:
    points = np.random.default_rng(0).random((9, 5))
    pairs = [np.linalg.norm(points[i] - points[j]) for i in range(9) for j in range(i)]
    assert mean_distance(points) == pytest.approx(np.mean(pairs))
