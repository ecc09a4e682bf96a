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
    place_apart,
    sample_latent,
)
from distill.worlds.shapeworld.schema import RELATIONS, SPEEDS, Scene

ONE = Scene((("red", "circle"),), "right", "quickly", "black")
TWO = Scene((("red", "circle"), ("blue", "ring")), "still", None, "black", "left of")
APART = Scene((("red", "circle"), ("blue", "ring")), "left", "slowly", "black", second_move=("up", "quickly"))
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
        (("radius", "speed"), lambda z: z.radius[0], lambda z: z.speed[0]),
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
    for other in (lambda z: z.growth, lambda z: z.background_shade, lambda z: z.bend[0], lambda z: z.horizon):
        assert abs(kendalltau([z.speed[0] for z in single], [other(z) for z in single]).statistic) < 0.05


def test_marginals_are_uniform_on_their_ranges(single: list[Latent]) -> None:
    samples = {
        "speed": ([z.speed[0] for z in single], SPEEDS["quickly"]),
        "radius": ([z.radius[0] for z in single], RADIUS_RANGE[1]),
        "growth": ([z.growth for z in single], GROWTH_RANGE[1]),
        "fade": ([z.fade for z in single], FADE_RANGE),
        "background_shade": ([z.background_shade for z in single], BACKGROUND_SHADE_RANGE),
        "bend": ([abs(z.bend[0]) for z in single], BEND_RANGE),
    }
    for name, (values, (low, high)) in samples.items():
        assert kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-3, name


def test_bend_has_two_equal_modes(single: list[Latent]) -> None:
    positive = np.mean([z.bend[0] > 0 for z in single])
    assert abs(positive - 0.5) < 0.04
    assert min(abs(z.bend[0]) for z in single) >= BEND_RANGE[0]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_objects_stay_on_the_canvas_apart_and_in_their_stated_relation(split: str) -> None:
    rng = np.random.default_rng(4)
    tau = np.linspace(0, 1, 97)
    for _ in range(400):
        scene = sample_scene(rng, split)
        latent = sample_latent(scene, rng)
        extents = [
            r * EXTENT[shape] * (1 + max(latent.growth, 0))
            for r, (_, shape) in zip(latent.radius, scene.objects, strict=True)
        ]
        paths = [np.array(start) + displacement(scene, latent, tau, at) for at, start in enumerate(latent.start)]
        for path, extent in zip(paths, extents, strict=True):
            assert (path - extent > -1e-6).all() and (path + extent < 64 + 1e-6).all()
        if scene.count == 2:
            assert latent.relation is not None
            direction = np.array(RELATIONS[latent.relation])
            assert (paths[0][0] - paths[1][0]) @ direction > 0
            gap = np.abs(paths[0] - paths[1]).max(axis=1) - sum(extents)
            # Objects that move apart are placed by their gap at 49 moments; between them it is hardly less.
            assert gap.min() >= MIN_GAP - (1e-6 if scene.second_move is None else 0.3)
            assert scene.relation in (None, latent.relation)


def test_relation_is_drawn_evenly_when_the_caption_does_not_say() -> None:
    scene = Scene((("red", "circle"), ("blue", "ring")), "still", None, "black")
    relations = [z.relation for z in draw(scene, seed=2)]
    for relation in RELATIONS:
        assert relations.count(relation) / NUM_DRAWS == pytest.approx(0.25, abs=0.04)


def test_objects_that_move_apart_have_a_speed_each_tied_to_their_own_radius() -> None:
    latents = draw(APART, seed=3)
    stated = 2 / math.pi * math.asin(RHO["radius", "speed"])
    for index, word in enumerate(("slowly", "quickly")):
        speed = [z.speed[index] for z in latents]
        assert kendalltau([z.radius[index] for z in latents], speed).statistic == pytest.approx(stated, abs=0.04)
        assert kstest(speed, "uniform", args=(SPEEDS[word][0], SPEEDS[word][1] - SPEEDS[word][0])).pvalue > 1e-3
    assert abs(kendalltau([z.speed[0] for z in latents], [z.speed[1] for z in latents]).statistic) < 0.05
    assert all(z.bend[0] == z.bend[1] for z in latents)


def test_a_still_object_beside_a_moving_one_has_no_speed_and_no_bow() -> None:
    scene = Scene(APART.objects, "still", None, "black", second_move=("left", "quickly"))
    latent = sample_latent(scene, np.random.default_rng(0))
    assert latent.speed[0] == latent.bend[0] == 0.0 and latent.speed[1] > 0.6 and latent.bend[1] != 0.0
    assert not displacement(scene, latent, np.linspace(0, 1, 5), 0).any()


def test_the_largest_objects_find_room_for_any_two_motions() -> None:
    triangles = (("red", "triangle"), ("blue", "triangle"))
    moves: list[tuple[str, str | None]] = [(name, "quickly") for name in ("left", "right", "up", "down")]
    moves.append(("still", None))
    size = np.array([64.0, 64.0])
    largest = RADIUS_RANGE[2][1] * EXTENT["triangle"] * (1 + GROWTH_RANGE[2][1])
    for first in moves:
        for second in moves:
            if first == second:
                continue
            scene = Scene(triangles, *first, "black", second_move=second)
            latent = Latent(
                radius=(7.2, 7.2),
                start=((0.0, 0.0), (0.0, 0.0)),
                shade=(1.0, 1.0),
                speed=tuple(SPEEDS["quickly"][1] if word else 0.0 for _, word in scene.moves),
                bend=tuple(BEND_RANGE[1] if word else 0.0 for _, word in scene.moves),
                growth=GROWTH_RANGE[2][1],
                fade=0.0,
                background_shade=1.0,
                horizon=50.0,
                relation=None,
            )
            paths = [displacement(scene, latent, np.linspace(0, 1, 49), index) for index in (0, 1)]
            start = place_apart([largest, largest], paths, size, np.random.default_rng(1))
            placed = [np.array(at) + path for at, path in zip(start, paths, strict=True)]
            assert all((path - largest > -1e-6).all() and (path + largest < 64 + 1e-6).all() for path in placed)
            assert (np.abs(placed[0] - placed[1]).max(axis=1) - 2 * largest).min() >= MIN_GAP - 1e-6
