"""Small videos, arms and studies for the tests of the blind study."""

from pathlib import Path

import numpy as np

from codmd_serve.video import write_video
from distill.evaluate.study.design import Study
from distill.evaluate.study.folders import compare_arms
from distill.evaluate.study.make import StudyOptions, build_study, plan_study
from distill.evaluate.study.simulate import simulated_study

PROMPTS = ("a red circle", "a blue ring", "a white triangle")


def write_clip(
    path: Path, number: int, *, size: int = 48, num_frames: int = 8, fps: int = 16, comment: str = ""
) -> None:
    """Write a square that moves right; its shade and height are those of `number`."""
    frames = np.full((num_frames, size, size, 3), (20 + 7 * number) % 256, dtype=np.uint8)
    top = 4 + 5 * number % (size - 16)
    for index in range(num_frames):
        left = 2 + index * (size - 16) // num_frames
        frames[index, top : top + 12, left : left + 12] = (200, (40 + 15 * number) % 256, 60)
    write_video([frames.tobytes()], path, height=size, width=size, fps=fps, crf=20, comment=comment)


def write_arms(folder: Path, *arms: str, prompts: tuple[str, ...] = PROMPTS) -> dict[str, Path]:
    """Write a folder of videos for each arm, named by their prompts; all differ."""
    folders = {}
    for arm_number, arm in enumerate(arms):
        folders[arm] = folder / arm
        for number, prompt in enumerate(prompts):
            write_clip(folders[arm] / f"{prompt}-0.mp4", arm_number * len(prompts) + number, comment=f"made by {arm}")
    return folders


def make_study(folder: Path, *arms: str, **options: int) -> Study:
    """Write arms and the study of them to `folder`/study."""
    folders = write_arms(folder / "arms", *arms)
    comparison = compare_arms(folders)
    assert comparison.problems == ()
    study = plan_study(tuple(folders), comparison, StudyOptions(**options))  # type: ignore[arg-type]
    build_study(study, comparison, folder / "study")
    return study


def design(num_arms: int = 2, num_prompts: int = 8, **options: int) -> Study:
    """Return a design without videos; its arms are called a, b, ..."""
    return simulated_study("abcdef"[:num_arms], num_prompts, **options)
