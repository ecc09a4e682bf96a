"""Training clips: a caption and its pixels belong together and depend on seed and index alone."""

import numpy as np

from distill.evaluate.detect import detect
from distill.evaluate.scores import score_clip
from distill.pretrain.teacher import training_captions, training_clip
from distill.shapeworld.captions import parse_caption


def test_captions_are_those_of_the_clips_and_the_pixels_show_them() -> None:
    captions = training_captions(5, 12)
    for index, caption in enumerate(captions):
        again, clip = training_clip(5, index)
        assert again == caption
        scene = parse_caption(caption)
        assert score_clip(scene, detect(clip), clip)["all"] == 1.0
        np.testing.assert_array_equal(clip, training_clip(5, index)[1])
    assert captions != training_captions(6, 12)
