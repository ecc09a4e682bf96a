"""Training clips: caption, pixels and objects belong together and depend on their source and index alone."""

import subprocess
import sys

import numpy as np

from distill.evaluate.detect import detect
from distill.evaluate.scores import score_clip
from distill.pretrain.clips import CLIP_SHAPE, ClipSource
from distill.worlds.shapeworld.captions import parse_caption


def test_captions_are_those_of_the_clips_and_the_pixels_show_them() -> None:
    source = ClipSource(5, two_object_share=0.75)
    captions = source.captions(8)
    for index, caption in enumerate(captions):
        clip = source.render(index)
        assert clip.caption == caption
        assert clip.pixels.shape == CLIP_SHAPE
        scene = parse_caption(caption)
        assert score_clip(scene, detect(clip.pixels), clip.pixels)["all"] == 1.0
        np.testing.assert_array_equal(clip.pixels, source.render(index).pixels)
    assert captions != ClipSource(6).captions(8)


def test_a_source_shows_two_objects_as_often_as_it_says() -> None:
    counts = np.array([parse_caption(caption).count for caption in ClipSource(5, two_object_share=0.75).captions(1000)])
    assert abs(np.mean(counts == 2) - 0.75) < 0.05


def test_points_are_object_pixels_and_bits_are_few() -> None:
    for index in range(6):
        clip = ClipSource(5).render(index)
        is_object = np.unpackbits(clip.object_bits, axis=-1).astype(bool)
        assert is_object.shape == CLIP_SHAPE[:3]
        assert 0.01 < is_object.mean() < 0.45
        assert is_object[tuple(clip.points.T)].all()
        # Every row without an object is of one colour.
        empty = ~is_object.any(axis=2)
        rows = clip.pixels[empty]
        assert (rows == rows[:, :1]).all()


def test_workers_import_no_torch() -> None:
    for module in ("distill.pretrain.render_worker", "distill.pretrain.curve_worker"):
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, module
