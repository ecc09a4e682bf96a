"""Renderer: colours and areas are exact, edges are antialiased, sizes are free, bad sizes are refused."""

import dataclasses
import time

import numpy as np
import pytest

from codmd_serve.errors import ConfigError
from distill.worlds.shapeworld.captions import sample_scene
from distill.worlds.shapeworld.law import Latent, sample_latent
from distill.worlds.shapeworld.render import AREA, coverage, render, sample_clip
from distill.worlds.shapeworld.schema import COLOURS, SHAPES, Scene

SCENE = Scene((("red", "circle"),), "right", "quickly", "black")
STRAIGHT = Latent(
    radius=(8.0,),
    start=((16.0, 32.0),),
    shade=(1.0,),
    speed=1.5,
    bend=0.0,
    growth=0.0,
    fade=0.2,
    background_shade=1.0,
    horizon=50.0,
    relation=None,
)


def test_one_frame_shows_the_stated_colours_where_they_belong() -> None:
    clip = render(SCENE, STRAIGHT)
    assert clip.shape == (17, 64, 64, 3) and clip.dtype == np.uint8
    assert tuple(clip[0, 32, 16]) == COLOURS["red"]
    assert tuple(clip[0, 2, 2]) == (10, 10, 10)
    assert tuple(clip[0, 60, 2]) == (28, 28, 28)  # below the horizon
    assert clip[16, 32, 40, 0] == round(235 * 0.8)  # moved 24 units, faded by a fifth


def test_object_moves_at_the_stated_speed() -> None:
    clip = render(SCENE, STRAIGHT).astype(float)
    weights = clip[:, :, :, 0] - clip[:, :, :1, 0]
    centres = (weights * np.arange(64)).sum((1, 2)) / weights.sum((1, 2))
    np.testing.assert_allclose(np.diff(centres), 1.5, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_stated_area_and_soft_edges(shape: str) -> None:
    grid = (np.arange(64) + 0.5 - 32).astype(np.float32)
    alpha = coverage(shape, grid[None, :], grid[:, None], np.float32(12.0), 1.0)
    assert alpha.sum() == pytest.approx(AREA[shape] * 144, rel=0.02)
    assert ((alpha > 0.05) & (alpha < 0.95)).any()


def test_size_scales_the_picture_and_frames_resample_time() -> None:
    big = render(SCENE, STRAIGHT, height=128, width=128, num_frames=33)
    assert big.shape == (33, 128, 128, 3)
    half = big.reshape(33, 64, 2, 64, 2, 3).mean((2, 4))[::2]
    assert np.abs(half - render(SCENE, STRAIGHT)).mean() < 1.0


def test_rectangular_canvas_is_used_in_full() -> None:
    rng = np.random.default_rng(0)
    columns = []
    for _ in range(60):
        clip = sample_clip(SCENE, rng, height=64, width=128)
        columns.append(int(np.argmax(clip[0, :, :, 0].max(axis=0))))
    assert clip.shape == (17, 64, 128, 3)
    assert max(columns) > 64


def test_same_latent_gives_the_same_pixels() -> None:
    rng = np.random.default_rng(7)
    scene = sample_scene(rng)
    latent = sample_latent(scene, rng)
    np.testing.assert_array_equal(render(scene, latent), render(scene, dataclasses.replace(latent)))


def test_single_frame_is_the_first_one() -> None:
    np.testing.assert_array_equal(render(SCENE, STRAIGHT, num_frames=1)[0], render(SCENE, STRAIGHT)[0])


@pytest.mark.parametrize(("height", "width", "num_frames"), [(60, 64, 17), (64, 0, 17), (64, 64, 0)])
def test_sizes_off_the_grid_are_refused(height: int, width: int, num_frames: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        render(SCENE, STRAIGHT, height, width, num_frames)


def test_a_thousand_clips_take_under_ten_seconds_of_one_core() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(250)]
    start = time.process_time()
    for scene in scenes:
        sample_clip(scene, rng)
    assert 4 * (time.process_time() - start) < 10.0
