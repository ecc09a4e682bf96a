"""Makes the folder of a study: blinded copies of all videos, catch trials, and study.json.

OUT/study.json      the design, with the names of the arms: not for raters
OUT/videos/*.mp4    copies under names that tell nothing
OUT/answers.jsonl   the log, when the study is served
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from codmd_serve.errors import ConfigError
from codmd_serve.files import atomic_folder
from distill.evaluate.study.design import (
    BROKEN,
    MISMATCHED,
    STUDY_FILE,
    VIDEO_DIR,
    Catch,
    Study,
    file_name,
    write_study,
)
from distill.evaluate.study.folders import Comparison
from distill.evaluate.study.media import break_clip, copy_clip, equalise_sizes

CHECK_SHARE = 0.08
MIN_CHECKS = 2
_CATCH_STREAM = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyOptions:
    """What a study may be told.

    Attributes:
        title: what raters read above the pairs.
        pairs_per_rater: 0 is all of them.
        num_catches, num_repeats: of each rater; None is CHECK_SHARE of the pairs, and at least MIN_CHECKS.
        seed: of the order of trials.
    """

    title: str = "Which video is better?"
    pairs_per_rater: int = 0
    num_catches: int | None = None
    num_repeats: int | None = None
    seed: int = 0


def check_out(out: Path) -> None:
    """Refuse a folder that holds anything: a study, somebody's answers, or videos that are not ours to replace.

    Raises:
        ConfigError: says what to do.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a study already" if (out / STUDY_FILE).exists() else "something already"
        raise ConfigError(f"{out} holds {what}: name another --out, or delete it")


def plan_study(arms: tuple[str, ...], comparison: Comparison, options: StudyOptions) -> Study:
    """Return the design for videos that have no problem.

    Raises:
        ConfigError: options out of their range.
    """
    items = comparison.items
    num_pairs = len(items) * len(arms) * (len(arms) - 1) // 2
    pairs_per_rater = options.pairs_per_rater or num_pairs
    num_checks = max(MIN_CHECKS, math.ceil(CHECK_SHARE * pairs_per_rater))
    num_catches = num_checks if options.num_catches is None else options.num_catches
    num_repeats = min(num_checks, pairs_per_rater) if options.num_repeats is None else options.num_repeats
    if num_catches < 0:
        raise ConfigError(f"catch trials must be 0 or more, got {num_catches}")
    return Study(
        id=secrets.token_hex(6),
        salt=secrets.token_hex(16),
        title=options.title,
        arms=arms,
        items=tuple(replace(item, duration_s=_duration_s(comparison, arms[0], item.name)) for item in items),
        catches=_plan_catches(arms, comparison, num_catches, options.seed),
        pairs_per_rater=pairs_per_rater,
        num_repeats=num_repeats,
        seed=options.seed,
    )


def _duration_s(comparison: Comparison, arm: str, name: str) -> float:
    return round(comparison.videos[arm][name].clip.duration_s, 3)


def _plan_catches(arms: tuple[str, ...], comparison: Comparison, num_catches: int, seed: int) -> tuple[Catch, ...]:
    """Plan broken and mismatched trials in turn; only broken ones where no other prompt has a video of that shape."""
    rng = np.random.default_rng([seed, _CATCH_STREAM])
    items, catches = comparison.items, []
    order = [int(index) for index in rng.permutation(len(items))]
    for number in range(num_catches):
        item, arm = order[number % len(items)], arms[number % len(arms)]
        clips = {index: comparison.videos[arm][items[index].name].clip for index in range(len(items))}
        shape = (clips[item].width, clips[item].height, clips[item].num_frames, clips[item].fps)
        others = [
            index
            for index, clip in clips.items()
            if items[index].prompt != items[item].prompt
            and (clip.width, clip.height, clip.num_frames, clip.fps) == shape
        ]
        if number % 2 and others:
            catches.append(Catch(MISMATCHED, item, arm, int(rng.choice(others))))
        else:
            catches.append(Catch(BROKEN, item, arm, item))
    return tuple(catches)


def build_study(study: Study, comparison: Comparison, out: Path, on_video: Callable[[], object] | None = None) -> None:
    """Write the whole folder, or nothing.

    Raises:
        GenerationError: a video cannot be encoded.
        ConfigError: the folder cannot be written.
    """
    try:
        with atomic_folder(out) as fresh:
            folder = fresh / VIDEO_DIR
            folder.mkdir()
            for paths in _copy_all(study, comparison, folder, on_video).values():
                equalise_sizes(paths)
            write_study(study, fresh)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}") from error


def num_copies(study: Study) -> int:
    """Return how many videos `build_study` writes."""
    return len(study.items) * len(study.arms) + len(study.catches)


def _copy_all(
    study: Study, comparison: Comparison, folder: Path, on_video: Callable[[], object] | None
) -> dict[int, list[Path]]:
    """Write all copies; return them by the item whose prompt they are shown with."""
    groups: dict[int, list[Path]] = {index: [] for index in range(len(study.items))}
    work: list[Callable[[], None]] = []

    def add(item: int, source: str, catch: int | None, arm: str, shown_item: int) -> None:
        target = folder / file_name(study, item, source, catch)
        video = comparison.videos[arm][study.items[shown_item].name]
        make = break_clip if source == BROKEN else copy_clip
        groups[item].append(target)
        work.append(lambda: make(video.path, video.clip, target))

    for item in range(len(study.items)):
        for arm in study.arms:
            add(item, arm, None, arm, item)
    for number, catch in enumerate(study.catches):
        add(catch.item, catch.kind, number, catch.arm, catch.other_item)
    with ThreadPoolExecutor(max_workers=max(1, min((os.cpu_count() or 1) // 2, 8))) as pool:
        for _ in pool.map(lambda job: job(), work):
            if on_video is not None:
                on_video()
    return groups
