"""Scores of one dimension over the videos of a plan, as results/<dimension>.json holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from codmd_serve.errors import ConfigError
from codmd_serve.files import write_json
from codmd_serve.textfiles import read_json_object, shown
from distill.evaluate.vbench.facts import DIMENSIONS
from distill.evaluate.vbench.manifest import refuse_case_collisions

RESULTS_NAME = "results"
FORMAT = "codmd-vbench-result-1"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoScore:
    """One video of a dimension.

    Attributes:
        prompt: the short prompt.
        sample: which of its videos.
        group: the dimensions of its prompt, joined; prompts are resampled within a group.
        score: raw, in [0, 1]; None when `reason` says why there is none.
        reason: empty; `not counted: ...` where VBench's protocol leaves the video out; else why it failed.
    """

    prompt: str
    sample: int
    group: str
    score: float | None
    reason: str = ""

    @property
    def is_counted(self) -> bool:
        """Whether the video is in the denominator; a failed one is, with score 0."""
        return not self.reason.startswith(NOT_COUNTED)


NOT_COUNTED = "not counted: "


@dataclass(frozen=True, kw_only=True, slots=True)
class DimensionResult:
    """The result of one dimension.

    Attributes:
        dimension: its name.
        raw: the score in [0, 1], failed videos counted as 0.
        evaluator_raw: what VBench gave, over the videos that it scored.
        videos: one for each planned video that the dimension takes; empty when only the mean is known.
        num_videos: that stand in the denominator; 0 when unknown.
        num_failed: of those.
        plan_sha256: of the plan; empty when the scores come from elsewhere.
        evaluator: versions by package.
        notes: what a reader must know.
    """

    dimension: str
    raw: float
    evaluator_raw: float
    videos: list[VideoScore] = field(default_factory=list)
    num_videos: int = 0
    num_failed: int = 0
    plan_sha256: str = ""
    evaluator: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_raw(value: object, what: str) -> float:
    """Return a raw score.

    Raises:
        ConfigError: not a number, NaN, infinite, or outside [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{what} must be a number in 0..1, got {shown(value)}")
    if not math.isfinite(value):
        raise ConfigError(f"{what} is {value}: that dimension was not scored; run it again")
    # Cosines and means of float32 end a rounding beside 1.
    if not -1e-6 <= value <= 1 + 1e-6:
        raise ConfigError(f"{what} must be in 0..1, got {value}: percentages and per-cent files are not raw scores")
    return min(max(float(value), 0.0), 1.0)


def write_result(folder: Path, result: DimensionResult) -> None:
    """Write the result of a dimension into a folder, which must exist."""
    write_json(folder / f"{result.dimension}.json", {"format": FORMAT, **asdict(result)}, indent=1)


def read_result(path: Path) -> DimensionResult:
    """Read what `write_result` wrote.

    Raises:
        ConfigError: no such file, another format, or scores that are none.
    """
    data = read_json_object(path, ConfigError)
    if data.pop("format", None) != FORMAT or data.get("dimension") not in DIMENSIONS:
        raise ConfigError(f"{path} is no result of `run`: expected the format {FORMAT} and a dimension of VBench")
    try:
        videos = [VideoScore(**entry) for entry in data.pop("videos")]
        result = DimensionResult(videos=videos, **data)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}; score that dimension again") from error
    check_raw(result.raw, f"{path}: raw")
    _check_denominator(result, path)
    for video in videos:
        if video.score is not None:
            check_raw(video.score, f"{path}: the score of sample {video.sample} of {shown(video.prompt)}")
    return result


def _check_denominator(result: DimensionResult, path: Path) -> None:
    """Refuse a file whose mean is not over all of its videos, failed ones included."""
    counted = [video for video in result.videos if video.is_counted]
    num_failed = sum(video.score is None for video in counted)
    expected = result.evaluator_raw * (len(counted) - num_failed) / len(counted) if counted else math.nan
    if (result.num_videos, result.num_failed) != (len(counted), num_failed) or not math.isclose(
        result.raw, expected, abs_tol=1e-6
    ):
        raise ConfigError(
            f"{path} is damaged: its mean of {result.num_videos} videos, {result.num_failed} of them failed, does not "
            f"belong to the {len(counted)} videos that it lists; score that dimension again"
        )


def read_results(folder: Path) -> dict[str, DimensionResult]:
    """Read all results of a plan's folder, or of the folder of results itself.

    Raises:
        ConfigError: none there, names that differ only in case, or results of two plans.
    """
    inner = folder / RESULTS_NAME if (folder / RESULTS_NAME).is_dir() else folder
    paths = sorted(path for path in inner.glob("*.json") if path.stem.casefold() in DIMENSIONS)
    refuse_case_collisions([path.name for path in paths], str(inner))
    if not paths:
        raise ConfigError(f"no results in {inner}: `codmd-distill eval vbench run {folder}` makes them")
    results = {result.dimension: result for result in map(read_result, paths)}
    plans = {result.plan_sha256 for result in results.values()}
    if len(plans) > 1 or len(results) < len(paths):
        raise ConfigError(f"{inner} holds results of {max(len(plans), 2)} plans: score each in a folder of its own")
    return results


def clustered(results: Mapping[str, DimensionResult]) -> dict[str, dict[str, tuple[float, int]]]:
    """Return per dimension and prompt the sum of the counted scores and their number."""
    table: dict[str, dict[str, tuple[float, int]]] = {}
    for name, result in results.items():
        sums: dict[str, tuple[float, int]] = {}
        for video in result.videos:
            if video.is_counted:
                total, number = sums.get(video.prompt, (0.0, 0))
                sums[video.prompt] = (total + (video.score or 0.0), number + 1)
        table[name] = sums
    return table


def strata(results: Mapping[str, DimensionResult]) -> dict[str, str]:
    """Return the group of every prompt."""
    return {video.prompt: video.group for result in results.values() for video in result.videos}
