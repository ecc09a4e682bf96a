"""ShapeBench: the clips and arms to draw, and every clip's scores and factors; knows no tables.

The breadth suite is many captions with few seeds, for caption following and looks; the depth suite a few moving
captions with many seeds, for what the caption leaves open. Both are held-out captions, the same for every arm.

Legend: K clips of an arm, S seeds of a caption, F factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from codmd_serve.errors import ConfigError
from distill.evaluate.detect import detect
from distill.evaluate.joint import (
    bend_coverage,
    factor_spread,
    marginal_distances,
    mean_distance,
    measure_factors,
    pixel_points,
)
from distill.evaluate.sample import Canvas, Request, render_truth
from distill.evaluate.scores import SCORES, score_clip
from distill.worlds.shapeworld.captions import held_out_captions, parse_caption
from distill.worlds.shapeworld.schema import STILL

DEPTH_SCORES = ("diversity", "pixel_diversity", "marginal", "bend_modes")
"""Per depth caption: diversity ratios (1 is right), distance of the margins (0), share of both bend modes (1)."""
_REFERENCE_REPEAT = 1
_MIN_REFERENCE = 128
_DEPTH_POOL = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteConfig:
    """Settings of the suites.

    Attributes:
        num_captions: held-out captions of the breadth suite, one and two objects in turn.
        num_seeds: clips of each.
        depth_captions: captions of the depth suite, one and two objects in turn, all of them moving alike; 0 leaves
            it out.
        depth_seeds: clips of each.
        seed: of captions, noise and ground truth.

    Raises:
        ConfigError: a number out of range.
    """

    num_captions: int = 128
    num_seeds: int = 1
    depth_captions: int = 4
    depth_seeds: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_captions": 2, "num_seeds": 1, "depth_captions": 0, "depth_seeds": 2, "seed": 0}
        for name, low in least.items():
            if not low <= getattr(self, name) <= 10_000:
                raise ConfigError(f"{name.replace('_', ' ')} must be in {low}..10000, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Suite:
    """The clips that every arm draws.

    Attributes:
        requests: all of them, each once.
        is_breadth: bool (K,), whether the clip belongs to the breadth suite.
        depth: caption indices of the depth suite.
    """

    requests: tuple[Request, ...]
    is_breadth: np.ndarray
    depth: tuple[int, ...]

    @property
    def caption_index(self) -> np.ndarray:
        """Return the caption index of each clip: int (K,)."""
        return np.array([request.caption_index for request in self.requests])

    @property
    def num_objects(self) -> np.ndarray:
        """Return the number of objects each clip's caption states: int (K,)."""
        return np.array([parse_caption(request.caption).count for request in self.requests])

    def rows(self, caption_index: int) -> np.ndarray:
        """Return the request indices of one caption's clips, in order of their seeds."""
        return np.nonzero(self.caption_index == caption_index)[0]


@dataclass(frozen=True, slots=True)
class Reference:
    """Ground truth of the depth suite, from other renders than the ground-truth arm.

    Attributes:
        factors: per depth caption (S', F).
        pixel_spread: per depth caption, mean pairwise pixel distance.
    """

    factors: dict[int, np.ndarray]
    pixel_spread: dict[int, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """Measurements of one arm.

    Attributes:
        name, label: short key, and the row's heading.
        scores: per name of SCORES the values of all clips, float (K,).
        depth_scores: per name of DEPTH_SCORES one value per depth caption.
        factors: float (K, F).
        psnr_db: against the ground-truth clips, for the arm through the VAE; else None.
        samples: the first clip of the first few captions, uint8 (T, H, W, 3), by caption index.
    """

    name: str
    label: str
    scores: dict[str, np.ndarray]
    depth_scores: dict[str, np.ndarray]
    factors: np.ndarray
    psnr_db: float | None = None
    samples: dict[int, np.ndarray] = field(default_factory=dict)


def plan_suite(config: SuiteConfig) -> Suite:
    """Choose captions and seeds; the same for the same config."""
    pool = held_out_captions(max(config.num_captions, _DEPTH_POOL * config.depth_captions), config.seed)
    moving: dict[int, list[int]] = {1: [], 2: []}
    for index, caption in enumerate(pool):
        scene = parse_caption(caption)
        if scene.motion != STILL and scene.second_move is None:
            moving[scene.count].append(index)
    by_turns = [moving[1 + turn % 2][turn // 2] for turn in range(config.depth_captions)]
    depth = tuple(sorted(by_turns))
    requests, is_breadth = [], []
    for index, caption in enumerate(pool):
        in_breadth = config.num_seeds if index < config.num_captions else 0
        for seed in range(max(in_breadth, config.depth_seeds if index in depth else 0)):
            requests.append(Request(caption, index, seed))
            is_breadth.append(seed < in_breadth)
    return Suite(tuple(requests), np.array(is_breadth), depth)


def measure_reference(suite: Suite, config: SuiteConfig, on_clips: Callable[[int], object]) -> Reference:
    """Render and measure the ground truth that the depth scores are judged against."""
    return measure_truth(suite, num_reference(config), config.seed, on_clips)


def measure_truth(
    suite: Suite, num_renders: int, seed: int, on_clips: Callable[[int], object], canvas: Canvas | None = None
) -> Reference:
    """Render and measure ground truth of the depth captions, from a seed and at a size of the caller's.

    Args:
        suite: whose depth captions are rendered.
        num_renders: of each caption.
        seed: of the renders.
        on_clips: called with 1 after each clip.
        canvas: the world's own size where it is None.
    """
    factors, spread = {}, {}
    for index in suite.depth:
        caption = suite.requests[suite.rows(index)[0]].caption
        requests = [Request(caption, index, number) for number in range(num_renders)]
        clips = render_truth(requests, seed, _REFERENCE_REPEAT, canvas)
        scene, rows = parse_caption(caption), []
        for clip in clips:
            rows.append(measure_factors(scene, detect(clip)))
            on_clips(1)
        factors[index], spread[index] = np.stack(rows), mean_distance(pixel_points(clips))
    return Reference(factors, spread)


def num_reference(config: SuiteConfig) -> int:
    """Return the number of ground-truth renders per depth caption."""
    return max(_MIN_REFERENCE, 2 * config.depth_seeds)


def measure_arm(
    name: str,
    label: str,
    clips: np.ndarray,
    suite: Suite,
    reference: Reference,
    on_clips: Callable[[int], object],
    *,
    psnr_db: float | None = None,
    keep_samples: Sequence[int] = (),
) -> ArmResult:
    """Detect and score every clip of an arm.

    Args:
        name, label: of the arm.
        clips: uint8 (K, T, H, W, 3), in the order of the suite's requests.
        suite, reference: what they are judged against.
        on_clips: called with 1 after each clip.
        psnr_db: passed on.
        keep_samples: caption indices whose first clip is kept.
    """
    scenes = {request.caption: parse_caption(request.caption) for request in suite.requests}
    scores, factors = [], []
    for request, clip in zip(suite.requests, clips, strict=True):
        detection = detect(clip)
        scores.append(score_clip(scenes[request.caption], detection, clip))
        factors.append(measure_factors(scenes[request.caption], detection))
        on_clips(1)
    by_clip = np.stack(factors)
    depth: dict[str, list[float]] = {key: [] for key in DEPTH_SCORES}
    for index in suite.depth:
        rows, truth = suite.rows(index), reference.factors[index]
        depth["diversity"].append(factor_spread(by_clip[rows], truth))
        spread = mean_distance(pixel_points(clips[rows]))
        depth["pixel_diversity"].append(spread / max(reference.pixel_spread[index], 1e-6))
        depth["marginal"].append(float(np.nanmean(marginal_distances(by_clip[rows], truth))))
        depth["bend_modes"].append(bend_coverage(by_clip[rows]))
    return ArmResult(
        name=name,
        label=label,
        scores={key: np.array([values[key] for values in scores]) for key in SCORES},
        depth_scores={key: np.array(values) for key, values in depth.items()},
        factors=by_clip,
        psnr_db=psnr_db,
        samples={index: clips[suite.rows(index)[0]] for index in keep_samples if len(suite.rows(index))},
    )
