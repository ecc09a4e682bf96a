"""Training clips: a caption and its pixels belong together and depend on their source and index alone."""

import numpy as np

from distill.evaluate.detect import detect
from distill.evaluate.scores import score_clip
from distill.pretrain.teacher import ClipSource
from distill.worlds.shapeworld.captions import parse_caption


def test_captions_are_those_of_the_clips_and_the_pixels_show_them() -> None:
    source = ClipSource(5)
    captions = source.captions(12)
    for index, caption in enumerate(captions):
        again, clip = source.clip(index)
        assert again == caption
        scene = parse_caption(caption)
        assert score_clip(scene, detect(clip), clip)["all"] == 1.0
        np.testing.assert_array_equal(clip, source.clip(index)[1])
    assert captions != ClipSource(6).captions(12)


def test_a_source_shows_two_objects_as_often_as_it_says() -> None:
    counts = np.array([parse_caption(caption).count for caption in ClipSource(5, two_object_share=0.75).captions(1000)])
    assert abs(np.mean(counts == 2) - 0.75) < 0.05
