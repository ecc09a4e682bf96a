"""The hidden law: stated dependences, stated ranges, and nothing leaves the canvas."""

import math

import numpy as np
import pytest
from scipy.stats import kendalltau, kstest

from distill.worlds.shapeworld.captions import sample_scene
from distill.worlds.shapeworld.law import (
    BACKGROUND_SHADE_RANGE,
    BEND_RANGE,
    EXTENT,
    FADE_RANGE,
    GROWTH_RANGE,
    MIN_GAP,
    RADIUS_RANGE,
    RHO,
    Latent,
    displacement,
    sample_latent,
)
from distill.worlds.shapeworld.schema import RELATIONS, SPEEDS, Scene

ONE = Scene((("red", "circle"),), "right", "quickly", "black")
TWO = Scene((("red", "circle"), ("blue", "ring")), "still", None, "black", "left of")
NUM_DRAWS = 2500


def draw(scene: Scene, seed: int = 0) -> list[Latent]:
    rng = np.random.default_rng(seed)
    return [sample_latent(scene, rng) for _ in range(NUM_DRAWS)]


@pytest.fixture(scope="module")
def single() -> list[Latent]:
    return draw(ONE)


@pytest.mark.parametrize(
    ("pair", "first", "second"),
    [
        (("radius", "speed"), lambda z: z.radius[0], lambda z: z.speed),
        (("growth", "fade"), lambda z: z.growth, lambda z: z.fade),
        (("shade", "background_shade"), lambda z: z.shade[0], lambda z: z.background_shade),
    ],
)
def test_tied_factors_have_the_stated_kendall_tau(single: list[Latent], pair, first, second) -> None:
    tau = kendalltau([first(z) for z in single], [second(z) for z in single]).statistic
    assert tau == pytest.approx(2 / math.pi * math.asin(RHO[pair]), abs=0.04)


def test_offsets_of_two_objects_are_tied() -> None:
    latents = draw(TWO, seed=1)
    tau = kendalltau([z.start[0][1] for z in latents], [z.start[1][1] for z in latents]).statistic
    # Below the .59 of the copula: each object's room depends on its own radius, which adds noise to the ranks.
    assert 0.5 < tau < 0.62


def test_untied_factors_are_independent(single: list[Latent]) -> None:
    for other in (lambda z: z.growth, lambda z: z.background_shade, lambda z: z.bend, lambda z: z.horizon):
        assert abs(kendalltau([z.speed for z in single], [other(z) for z in single]).statistic) < 0.05


def test_marginals_are_uniform_on_their_ranges(single: list[Latent]) -> None:
    samples = {
        "speed": ([z.speed for z in single], SPEEDS["quickly"]),
        "radius": ([z.radius[0] for z in single], RADIUS_RANGE[1]),
        "growth": ([z.growth for z in single], GROWTH_RANGE[1]),
        "fade": ([z.fade for z in single], FADE_RANGE),
        "background_shade": ([z.background_shade for z in single], BACKGROUND_SHADE_RANGE),
        "bend": ([abs(z.bend) for z in single], BEND_RANGE),
    }
    for name, (values, (low, high)) in samples.items():
        assert kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-3, name


def test_bend_has_two_equal_modes(single: list[Latent]) -> None:
    positive = np.mean([z.bend > 0 for z in single])
    assert abs(positive - 0.5) < 0.04
    assert min(abs(z.bend) for z in single) >= BEND_RANGE[0]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_objects_stay_on_the_canvas_apart_and_in_their_stated_relation(split: str) -> None:
    rng = np.random.default_rng(4)
    tau = np.linspace(0, 1, 17)
    for _ in range(400):
        scene = sample_scene(rng, split)
        latent = sample_latent(scene, rng)
        extents = [
            r * EXTENT[shape] * (1 + max(latent.growth, 0))
            for r, (_, shape) in zip(latent.radius, scene.objects, strict=True)
        ]
        paths = [np.array(start) + displacement(scene, latent, tau) for start in latent.start]
        for path, extent in zip(paths, extents, strict=True):
            assert (path - extent > -1e-6).all() and (path + extent < 64 + 1e-6).all()
        if scene.count == 2:
            assert latent.relation is not None
            direction = np.array(RELATIONS[latent.relation])
            gap = (paths[0][0] - paths[1][0]) @ direction - sum(extents)
            assert gap >= MIN_GAP - 1e-6
            assert scene.relation in (None, latent.relation)


def test_relation_is_drawn_evenly_when_the_caption_does_not_say() -> None:
    scene = Scene((("red", "circle"), ("blue", "ring")), "still", None, "black")
    relations = [z.relation for z in draw(scene, seed=2)]
    for relation in RELATIONS:
        assert relations.count(relation) / NUM_DRAWS == pytest.approx(0.25, abs=0.04)
