"""Scores of one clip, and that each kind of damage is seen by the score meant for it."""

from collections.abc import Callable

import numpy as np
import pytest

from distill.evaluate.detect import detect
from distill.evaluate.scores import CAPTION_SCORES, SCORES, imaging_quality, pair_objects, saturation, score_clip
from distill.worlds.shapeworld.captions import parse_caption
from distill.worlds.shapeworld.render import sample_clip
from distill.worlds.shapeworld.schema import Scene

CAPTION = "a red circle left of a blue ring moves up quickly on a black background"


def clip_of(caption: str, seed: int = 0) -> np.ndarray:
    return sample_clip(parse_caption(caption), np.random.default_rng(seed))


def scores_of(caption: str, clip: np.ndarray) -> dict[str, float]:
    return score_clip(parse_caption(caption), detect(clip), clip)


def mean_scores(examples: list, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    rows = []
    for example in examples[:16]:
        clip = change(example.clip)
        rows.append(score_clip(example.scene, detect(clip), clip))
    return {name: float(np.nanmean([row[name] for row in rows])) for name in SCORES}


def test_score_clip_gives_a_render_full_marks() -> None:
    scores = scores_of(CAPTION, clip_of(CAPTION))
    assert tuple(scores) == SCORES
    assert [scores[name] for name in CAPTION_SCORES] == [1.0] * len(CAPTION_SCORES)
    assert scores["flicker"] == 0.0
    assert scores["imaging"] > 0.99
    assert abs(scores["saturation"]) < 0.01


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (CAPTION.replace("circle", "square"), {"object", "object_colour"}),
        (CAPTION.replace("red", "green"), {"colour", "object_colour"}),
        (CAPTION.replace("up", "down"), {"direction"}),
        (CAPTION.replace("quickly", "slowly"), {"speed"}),
        (CAPTION.replace("black", "navy"), {"background"}),
        (CAPTION.replace("left", "right"), {"relation"}),
        (CAPTION.replace("red circle", "blue circle").replace("blue ring", "red ring"), {"object", "object_colour"}),
    ],
)
def test_caption_scores_name_exactly_what_is_wrong(shown: str, wrong: set[str]) -> None:
    if "relation" not in wrong and "blue circle" in shown:
        shown = shown.replace("left of", "right of")
    scores = scores_of(CAPTION, clip_of(shown))
    assert {name for name in CAPTION_SCORES if scores[name] == 0.0} == wrong | {"all"}


def test_caption_scores_of_a_missing_object_and_of_nothing() -> None:
    one = scores_of(CAPTION, clip_of("a red circle moves up quickly on a black background"))
    lost = {"object", "colour", "object_colour", "count", "direction", "speed", "relation", "all"}
    assert {name for name in CAPTION_SCORES if one[name] == 0.0} == lost
    nothing = scores_of(CAPTION, np.full((17, 64, 64, 3), 10, dtype=np.uint8))
    assert {name for name in CAPTION_SCORES if nothing[name] == 0.0} == lost
    assert (nothing["smoothness"], nothing["dynamic"], nothing["imaging"]) == (0.0, 0.0, 0.0)
    assert np.isnan(nothing["saturation"])


def test_caption_scores_leave_out_what_is_not_said() -> None:
    caption = "a red circle stays still on a black background"
    scores = scores_of(caption, clip_of(caption))
    assert np.isnan(scores["speed"]) and np.isnan(scores["relation"])
    assert scores["all"] == 1.0
    moving = scores_of(caption, clip_of("a red circle moves left slowly on a black background"))
    assert (moving["direction"], moving["all"]) == (0.0, 0.0)


def test_pair_objects_prefers_colour_over_shape() -> None:
    found = detect(clip_of("a red ring left of a blue circle stays still on a gray background"))
    scene = Scene((("blue", "ring"), ("red", "circle")), "still", None, "gray")
    assert [track.colour for track in pair_objects(scene, found) if track] == ["blue", "red"]


def test_saturation_is_free_of_brightness() -> None:
    colour = np.array([235.0, 45.0, 40.0])
    assert saturation(0.6 * colour) == pytest.approx(saturation(colour))
    assert saturation(np.zeros(3)) == 0.0


def test_oversaturation_is_seen_by_the_saturation_error_only(examples: list) -> None:
    def saturate(clip: np.ndarray) -> np.ndarray:
        gray = clip.astype(float).mean(axis=-1, keepdims=True)
        return np.clip(np.rint(gray + 1.35 * (clip - gray)), 0, 255).astype(np.uint8)

    plain, changed = mean_scores(examples, lambda clip: clip), mean_scores(examples, saturate)
    assert abs(plain["saturation"]) < 0.01 and plain["saturation_abs"] < 0.01
    assert changed["saturation"] > 0.08
    for name in ("object", "colour", "direction", "smoothness"):
        assert changed[name] == pytest.approx(plain[name], abs=0.05), name


def test_frozen_video_is_seen_by_direction_and_dynamic_degree(examples: list) -> None:
    plain = mean_scores(examples, lambda clip: clip)
    frozen = mean_scores(examples, lambda clip: np.repeat(clip[8:9], len(clip), axis=0))
    assert plain["dynamic"] > 0.7 and frozen["dynamic"] == 0.0
    assert frozen["direction"] < 0.35
    assert frozen["object_colour"] == plain["object_colour"]


def test_shuffled_frames_are_seen_by_smoothness(examples: list) -> None:
    order = np.random.default_rng(0).permutation(17)
    plain, shuffled = (mean_scores(examples, lambda clip, o=o: clip[o]) for o in (np.arange(17), order))
    assert shuffled["smoothness"] < 0.6 < 0.85 < plain["smoothness"]
    assert shuffled["direction"] < plain["direction"]


def test_noise_is_seen_by_flicker_and_blur_by_imaging(examples: list, degraded: Callable[..., np.ndarray]) -> None:
    plain = mean_scores(examples, lambda clip: clip)
    noisy = mean_scores(examples, lambda clip: degraded(clip, 1, 4.0, 0.0))
    blurred = mean_scores(examples, lambda clip: degraded(clip, 1, 0.0, 1.2))
    assert plain["flicker"] < 0.1 and noisy["flicker"] > 3.0
    assert plain["imaging"] > 0.99
    assert blurred["imaging"] < 0.9 and blurred["flicker"] < 0.5


def test_imaging_quality_falls_with_blur(degraded: Callable[..., np.ndarray]) -> None:
    clip = clip_of(CAPTION)
    qualities = []
    for blur in (0.0, 0.5, 1.0, 2.0):
        shown = degraded(clip, 0, 0.0, blur)
        qualities.append(imaging_quality(shown, detect(shown)))
    assert qualities == sorted(qualities, reverse=True) and qualities[-1] < 0.75
