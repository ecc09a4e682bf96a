"""The form score: full marks for the world, and it sees what the caption scores call right."""

from dataclasses import replace

import numpy as np
import pytest

from distill.evaluate.detect import detect
from distill.evaluate.form import FORM_SCORES, form_scores
from distill.evaluate.scores import CAPTION_SCORES, score_clip
from distill.worlds.shapeworld.captions import parse_caption
from distill.worlds.shapeworld.law import Latent, sample_latent
from distill.worlds.shapeworld.render import frame_windows, render, volume
from distill.worlds.shapeworld.schema import COLOURS, Scene

SCALE = 96 / 64


def draw(caption: str, seed: int = 0) -> tuple[Scene, Latent, np.ndarray]:
    scene = parse_caption(caption)
    latent = replace(sample_latent(scene, np.random.default_rng(seed)), growth=0.1)
    return scene, latent, render(scene, latent)


def path_of(latent: Latent, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Centres (T, 2) and radii (T,) of the first object, pixels."""
    tracks = detect(render(scene, latent)).tracks
    return tracks[0].centres * SCALE, tracks[0].radii * SCALE


def paint_octagon(scene: Scene, latent: Latent) -> np.ndarray:
    """The clip with a regular octagon of the same area in the place of the circle."""
    centre, radius = path_of(latent, scene)
    clip = render(scene, replace(latent, radius=(0.0,)))
    windows, dx, dy = frame_windows(centre, 1.3 * float(radius.max()), 96, 96)
    size = radius[:, None, None]
    inner = np.sqrt(np.pi / (8 * np.tan(np.pi / 8))) * size
    reach = np.maximum(np.maximum(np.abs(dx), np.abs(dy)), (np.abs(dx) + np.abs(dy)) / np.sqrt(2)) - inner
    share = np.clip(0.5 - reach, 0.0, 1.0)[..., None]
    light = latent.shade[0] * (1.0 - latent.fade * np.linspace(0, 1, 25))[:, None, None] * volume(dx, dy, size)
    for at, window in enumerate(windows):
        painted = light[at][..., None] * np.array(COLOURS[scene.objects[0][0]])
        clip[window] = np.rint(clip[window] + share[at] * (painted - clip[window]))
    return clip


def tear_ring(scene: Scene, latent: Latent, clip: np.ndarray, frames: slice, width: float) -> np.ndarray:
    """The clip with a gap of `width` radians in the ring, on its right, in some of its frames."""
    centre, radius = path_of(latent, scene)
    empty = render(scene, replace(latent, radius=(0.0,)))
    torn = clip.copy()
    windows, dx, dy = frame_windows(centre, 1.2 * float(radius.max()), 96, 96)
    is_gap = np.abs(np.arctan2(dy, dx)) < width / 2
    for at in range(25)[frames]:
        torn[windows[at]] = np.where(is_gap[at][..., None], empty[windows[at]], clip[windows[at]])
    return torn


@pytest.mark.parametrize("count", [1, 2])
def test_the_world_keeps_its_form(examples: list, count: int) -> None:
    some = [example for example in examples if example.scene.count == count][:40]
    rows = [score_clip(e.scene, detect(e.clip), e.clip) for e in some]
    assert np.mean([row["form"] for row in rows]) > 0.985
    assert np.mean([row["form_worst"] for row in rows]) > 0.95
    assert all(row["form_whole"] == 1.0 for row in rows)


def test_an_octagon_for_a_circle_is_seen_by_the_form_and_by_no_caption_score() -> None:
    caption = "a red circle moves right slowly on a black background"
    for seed in range(4):
        scene, latent, clip = draw(caption, seed)
        octagon = paint_octagon(scene, latent)
        good, bad = (score_clip(scene, detect(shown), shown) for shown in (clip, octagon))
        assert all(np.isnan(bad[name]) or bad[name] == 1.0 for name in CAPTION_SCORES)
        assert good["form"] > 0.985
        assert bad["form"] < good["form"] - 0.03
        assert bad["form_worst"] < good["form_worst"] - 0.03


def test_a_torn_ring_is_seen_by_the_form_and_by_no_caption_score() -> None:
    scene, latent, clip = draw("a blue ring stays still on a gray background")
    good = score_clip(scene, detect(clip), clip)
    torn = tear_ring(scene, latent, clip, slice(None), 1.2)
    everywhere = score_clip(scene, detect(torn), torn)
    torn = tear_ring(scene, latent, clip, slice(10, 13), 2.2)
    briefly = score_clip(scene, detect(torn), torn)
    for bad in (everywhere, briefly):
        assert all(np.isnan(bad[name]) or bad[name] == 1.0 for name in CAPTION_SCORES)
        assert bad["form_worst"] < good["form_worst"] - 0.15
    assert everywhere["form"] < good["form"] - 0.12
    assert briefly["form"] > 0.9 and briefly["form_whole"] == 0.0


def test_a_neighbour_of_the_same_hue_is_not_taken_for_the_object() -> None:
    scene = parse_caption("a white square left of a yellow square stay still on a black background")
    latent = replace(sample_latent(scene, np.random.default_rng(0)), start=((24.0, 30.0), (40.0, 30.0)), growth=0.0)
    clip = render(scene, latent)
    assert score_clip(scene, detect(clip), clip)["form_worst"] > 0.93


def test_what_was_not_found_overlaps_nothing() -> None:
    scene, _, clip = draw("a red circle moves up quickly on a black background")
    two = parse_caption("a red circle and a blue ring move up quickly on a black background")
    both = score_clip(two, detect(clip), clip)
    assert both["form"] == pytest.approx(score_clip(scene, detect(clip), clip)["form"] / 2)
    assert both["form_whole"] == 0.0
    nothing = np.full((25, 96, 96, 3), 10, dtype=np.uint8)
    assert form_scores(detect(nothing), [None], nothing) == dict.fromkeys(FORM_SCORES, 0.0)


def test_frames_in_which_the_object_is_gone_are_the_worst() -> None:
    scene, latent, clip = draw("a red circle moves up quickly on a black background")
    gone = clip.copy()
    gone[7] = render(scene, replace(latent, radius=(0.0,)))[7]
    scores = score_clip(scene, detect(gone), gone)
    assert scores["form_worst"] == 0.0 and scores["form"] > 0.9
