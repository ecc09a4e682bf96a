"""ShapeBench's scores during a run: caption following, and how the factors that a caption leaves open depend.

The captions are a split of their own. No report can use one of them: reports draw held-out scenes, these are scenes of
the training split. And the run itself trains on none of them. Noise and ground truth come from seeds that no report
can name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.data.prompts import load_prompts
from distill.evaluate import sample
from distill.evaluate.joint import dependence_distance, pair_taus
from distill.evaluate.scores import CAPTION_SCORES
from distill.evaluate.shapebench import Reference, Suite, measure_arm, measure_truth
from distill.networks.base import Base
from distill.settings import HIGH, LOW
from distill.validate.suites import CLIPS, Request, Samples
from distill.worlds.shapeworld.captions import parse_caption, unseen_captions
from distill.worlds.shapeworld.schema import STILL, Scene

# `SuiteConfig` refuses a seed of a report above 10,000.
VALIDATION_SEED = 20_261_127
NUM_TRUTH = 128
VIDEO_BETTER = {"imaging": HIGH, "smoothness": HIGH, "flicker": LOW, "saturation_abs": LOW}
DEEP_BETTER = {"dependence": LOW, "marginal": LOW}
# 1 is right, so neither direction is better.
DEEP_OTHER = ("diversity",)


def shapebench_suite(config: DistillConfig, base: Base) -> "ShapeBenchSuite":
    """Choose the captions of a run's validation.

    Raises:
        ConfigError: the run has prompts of its own for validation, or its prompts cannot be read.
    """
    del base
    settings = config.validate
    if settings.prompts:
        raise ConfigError("validate.prompts is for suite command: shapebench draws captions that it can score")
    captions = validation_captions(settings.num_prompts, load_prompts(config))
    deep = _deep(captions, settings.deep_prompts)
    if len(deep) < settings.deep_prompts:
        raise ConfigError(
            f"validate.deep_prompts is {settings.deep_prompts}, but only {len(deep)} of validate.num_prompts="
            f"{settings.num_prompts} captions move alike: raise validate.num_prompts"
        )
    requests, is_breadth = [], []
    for index, caption in enumerate(captions):
        for seed in range(settings.deep_seeds if index in deep else 1):
            requests.append(sample.Request(caption, index, seed))
            is_breadth.append(seed == 0)
    size = config.native
    return ShapeBenchSuite(
        suite=Suite(tuple(requests), np.array(is_breadth), deep),
        canvas=sample.Canvas(size.height, size.width, size.num_frames),
    )


def validation_captions(num_captions: int, training: Sequence[str]) -> list[str]:
    """Return distinct canonical captions of the validation split, one and two objects in turn.

    Args:
        num_captions: how many.
        training: prompts of the run; a scene that one of them shows is left out, whatever its phrasing.

    Raises:
        ConfigError: there are not so many.
    """
    chosen = unseen_captions(num_captions, VALIDATION_SEED, training)
    if len(chosen) < num_captions:
        raise ConfigError(f"validate.num_prompts must be {len(chosen)} or less: the run trains on all other captions")
    return chosen


def _deep(captions: Sequence[str], num: int) -> tuple[int, ...]:
    """Return the first captions whose objects all move alike, one and two objects in turn where there are both."""
    moving: dict[int, list[int]] = {1: [], 2: []}
    for index, caption in enumerate(captions):
        scene: Scene = parse_caption(caption)
        if scene.motion != STILL and scene.second_move is None:
            moving[scene.count].append(index)
    pairs = [index for pair in zip(moving[1], moving[2], strict=False) for index in pair]
    rest = [index for index in (*moving[1], *moving[2]) if index not in pairs]
    return tuple(sorted((*pairs, *rest)[:num]))


@final
@dataclass(frozen=True, kw_only=True)
class ShapeBenchSuite:
    """The clips of a validation and their scores.

    Attributes:
        suite: captions and seeds, as ShapeBench scores them.
        canvas: size of the clips.
    """

    suite: Suite
    canvas: sample.Canvas
    needs: str = CLIPS

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The samples."""
        return tuple(Request(request.caption, request.seed) for request in self.suite.requests)

    @property
    def better(self) -> dict[str, str]:
        """The direction of each value."""
        deep = DEEP_BETTER if self.suite.depth else {}
        return {**dict.fromkeys(CAPTION_SCORES, HIGH), **VIDEO_BETTER, **deep}

    @cached_property
    def reference(self) -> Reference:
        """Ground truth of the deep captions; rendered at the first validation, by rank 0 alone."""
        return measure_truth(self.suite, NUM_TRUTH, VALIDATION_SEED, lambda _: None, self.canvas)

    def score(self, samples: Samples) -> dict[str, float]:
        """Return caption and video scores, means over the captions, and the deep scores; nan is left out."""
        assert samples.clips is not None
        arm = measure_arm("student", "student", samples.clips, self.suite, self.reference, lambda _: None)
        breadth = self.suite.is_breadth
        values = {name: _mean(arm.scores[name][breadth]) for name in (*CAPTION_SCORES, *VIDEO_BETTER)}
        if self.suite.depth:
            groups = [arm.factors[self.suite.rows(index)] for index in self.suite.depth]
            truth = pair_taus([self.reference.factors[index] for index in self.suite.depth])
            values["dependence"] = float(dependence_distance(pair_taus(groups), truth)[0])
            values |= {name: _mean(arm.depth_scores[name]) for name in ("marginal", *DEEP_OTHER)}
        return {name: value for name, value in values.items() if not np.isnan(value)}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
