"""What a measuring process does: objects of a clip to factors and a verdict. Imports no torch."""

import signal

import numpy as np

from distill.evaluate.detect import detect
from distill.evaluate.joint import measure_factors
from distill.evaluate.scores import score_clip
from distill.worlds.shapeworld.captions import parse_caption
from distill.worlds.shapeworld.render import sample_clip


def ignore_interrupts() -> None:
    """Prepare a worker: an interrupt is the main process's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def measure_clip(caption: str, clip: np.ndarray) -> tuple[np.ndarray, bool]:
    """Factors (F,) of a clip, and whether it shows all that its caption says."""
    scene, detection = parse_caption(caption), detect(clip)
    return measure_factors(scene, detection), score_clip(scene, detection, clip)["all"] == 1.0


def measure_truth(caption: str, seed: list[int]) -> np.ndarray:
    """Factors (F,) of a render of the caption."""
    scene = parse_caption(caption)
    return measure_factors(scene, detect(sample_clip(scene, np.random.default_rng(seed))))
