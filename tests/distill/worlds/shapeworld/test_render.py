"""Renderer: colours and areas are exact, edges are antialiased, sizes are free, bad sizes are refused."""

import dataclasses
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from codmd_serve.errors import ConfigError
from distill.worlds.shapeworld.captions import sample_scene
from distill.worlds.shapeworld.law import Latent, sample_latent
from distill.worlds.shapeworld.render import AREA, VOLUME, background_rows, coverage, render, sample_clip
from distill.worlds.shapeworld.schema import BACKGROUNDS, COLOURS, SHAPES, Scene

SCENE = Scene((("red", "circle"),), "right", "quickly", "black")
STRAIGHT = Latent(
    radius=(8.0,),
    start=((16.0, 32.0),),
    shade=(1.0,),
    speed=(1.0,),
    bend=(0.0,),
    growth=0.0,
    fade=0.2,
    background_shade=1.0,
    horizon=50.0,
    relation=None,
)


def test_one_frame_shows_the_stated_colours_lit_from_the_upper_left() -> None:
    clip = render(SCENE, STRAIGHT)
    assert clip.shape == (25, 96, 96, 3) and clip.dtype == np.uint8
    red = np.array(COLOURS["red"])
    # Centre at pixel (24, 48), radius 12: half way into the shade in the middle, none of it at the upper left.
    np.testing.assert_allclose(clip[0, 48, 24], red * (1 - VOLUME / 2), atol=2)
    np.testing.assert_allclose(clip[0, 38, 22], red * (1 - VOLUME * 0.09), atol=2)
    np.testing.assert_allclose(clip[0, 58, 26], red * (1 - VOLUME * 0.91), atol=2)
    np.testing.assert_allclose(clip[24, 48, 60], red * 0.8 * (1 - VOLUME / 2), atol=2)  # moved 24 units, faded by .2


def test_background_is_a_sky_and_a_lighter_floor_each_lighter_downwards() -> None:
    column = render(SCENE, STRAIGHT)[0, :, 95].astype(float)
    assert (column == column[:, :1]).all()  # black is a gray
    sky, floor = column[:74, 0], column[76:, 0]  # the horizon is at row 75
    assert abs(sky.mean() - 10) < 0.5 and abs(floor.mean() - 36) < 0.5
    assert sky[-1] - sky[0] == pytest.approx(9, abs=1) and floor[-1] - floor[0] == pytest.approx(8, abs=1)
    assert floor[0] - sky[-1] > 15


def test_background_rows_without_a_horizon_are_a_sky_alone() -> None:
    rows = background_rows("navy", 64.0, 1.0, 64)
    assert np.ptp(rows[:, 0]) == pytest.approx(9, abs=0.5)
    np.testing.assert_allclose(rows.mean(axis=0), BACKGROUNDS["navy"], atol=0.1)


def test_object_moves_at_the_stated_speed() -> None:
    clip = render(SCENE, STRAIGHT).astype(float)
    weights = clip[:, :, :, 0] - clip[:, :, 95:, 0]
    weights[weights < 2] = 0
    centres = (weights * np.arange(96)).sum((1, 2)) / weights.sum((1, 2))
    np.testing.assert_allclose(np.diff(centres), 1.5, atol=0.02)


def test_two_objects_move_each_in_its_own_way() -> None:
    scene = Scene((("red", "circle"), ("blue", "square")), "right", "quickly", "black", second_move=("still", None))
    z = dataclasses.replace(
        STRAIGHT,
        radius=(6.0, 6.0),
        start=((12.0, 16.0), (44.0, 40.0)),
        shade=(1.0, 1.0),
        speed=(1.0, 0.0),
        bend=(0.0, 0.0),
        fade=0.0,
    )
    clip = render(scene, z).astype(int)
    is_red, is_blue = clip[..., 0] > 150, clip[..., 2] > 150
    assert np.argwhere(is_red[24])[:, 1].mean() - np.argwhere(is_red[0])[:, 1].mean() == pytest.approx(36, abs=0.5)
    np.testing.assert_array_equal(is_blue[0], is_blue[24])


def test_covered_marks_the_pixels_that_objects_touch_and_no_other() -> None:
    covered = np.zeros((25, 96, 96), dtype=bool)
    clip = render(SCENE, STRAIGHT, covered=covered)
    np.testing.assert_array_equal(clip, render(SCENE, STRAIGHT))
    empty = render(SCENE, dataclasses.replace(STRAIGHT, radius=(0.0,), start=((-9.0, -9.0),)))
    differs = (clip != empty).any(axis=-1)
    assert (differs <= covered).all()
    assert covered.sum() < 1.05 * differs.sum() and differs.sum() > 25 * 400


def test_an_object_across_the_edge_is_cut_and_not_moved() -> None:
    far = dataclasses.replace(STRAIGHT, speed=(0.0,))
    frames = render(SCENE, far)
    at_edge = render(SCENE, dataclasses.replace(far, start=((0.0, 32.0),)))
    np.testing.assert_array_equal(at_edge[:, :, :12], frames[:, :, 24:36])


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_stated_area_and_soft_edges(shape: str) -> None:
    grid = (np.arange(64) + 0.5 - 32).astype(np.float32)
    alpha = coverage(shape, grid[None, :], grid[:, None], np.float32(12.0), 1.0)
    assert alpha.sum() == pytest.approx(AREA[shape] * 144, rel=0.02)
    assert ((alpha > 0.05) & (alpha < 0.95)).any()


def test_size_scales_the_picture_and_frames_resample_time() -> None:
    big = render(SCENE, STRAIGHT, height=192, width=192, num_frames=49)
    assert big.shape == (49, 192, 192, 3)
    half = big.reshape(49, 96, 2, 96, 2, 3).mean((2, 4))[::2]
    assert np.abs(half - render(SCENE, STRAIGHT)).mean() < 1.0
    first_edition = render(SCENE, STRAIGHT, height=64, width=64, num_frames=17)
    assert first_edition.shape == (17, 64, 64, 3)
    np.testing.assert_allclose(first_edition[16, 32, 40], big[48, 96, 120], atol=2)


def test_rectangular_canvas_is_used_in_full() -> None:
    rng = np.random.default_rng(0)
    columns = []
    for _ in range(60):
        clip = sample_clip(SCENE, rng, height=96, width=192)
        columns.append(int(np.argmax(clip[0, :, :, 0].max(axis=0))))
    assert clip.shape == (25, 96, 192, 3)
    assert max(columns) > 96


def test_same_latent_gives_the_same_pixels() -> None:
    rng = np.random.default_rng(7)
    scene = sample_scene(rng)
    latent = sample_latent(scene, rng)
    np.testing.assert_array_equal(render(scene, latent), render(scene, dataclasses.replace(latent)))


def clip_of_seed(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return sample_clip(sample_scene(rng), rng).tobytes()


def test_rendering_in_other_processes_gives_the_same_pixels() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(clip_of_seed, range(4))) == [clip_of_seed(seed) for seed in range(4)]
        scene = sample_scene(np.random.default_rng(5), count=2)
        latent = sample_latent(scene, np.random.default_rng(5))
        np.testing.assert_array_equal(pool.submit(render, scene, latent).result(), render(scene, latent))


def test_single_frame_is_the_first_one() -> None:
    np.testing.assert_array_equal(render(SCENE, STRAIGHT, num_frames=1)[0], render(SCENE, STRAIGHT)[0])


@pytest.mark.parametrize(("height", "width", "num_frames"), [(60, 64, 17), (64, 0, 17), (64, 64, 0)])
def test_sizes_off_the_grid_are_refused(height: int, width: int, num_frames: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        render(SCENE, STRAIGHT, height, width, num_frames)


def test_a_thousand_clips_take_under_six_seconds_of_one_core() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(250)]
    start = time.process_time()
    for scene in scenes:
        sample_clip(scene, rng)
    assert 4 * (time.process_time() - start) < 6.0
