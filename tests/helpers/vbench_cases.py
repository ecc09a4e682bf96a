"""Inputs of the VBench tests: a prompt list of our own in VBench's form, small videos, results."""

from pathlib import Path
from typing import Any

import numpy as np

from codmd_serve.video import write_video
from distill.evaluate.vbench.facts import DIMENSIONS
from distill.evaluate.vbench.results import DimensionResult, VideoScore

FLICKER = "temporal_flickering"
ENTRIES: list[dict[str, Any]] = [
    {"prompt_en": "In a still frame, a red circle", "dimension": [FLICKER]},
    {"prompt_en": "in a still frame, a red circle", "dimension": [FLICKER]},
    {"prompt_en": "../../a red circle/../moves", "dimension": ["scene", "background_consistency"]},
    {"prompt_en": "a person is running", "dimension": ["human_action"]},
    {
        "prompt_en": "a red ring",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "red"}},
    },
    {"prompt_en": "a red ring", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
    {"prompt_en": "a blue ring", "dimension": ["color"], "auxiliary_info": {"color": "blue"}},
]
PLANNED = [name for name in DIMENSIONS if any(name in entry["dimension"] for entry in ENTRIES)]


def draw_video(path: Path, seed: int, *, num_frames: int = 3, size: int = 16, fps: int = 8) -> None:
    """Write a small video of random blocks."""
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, size // 4, size // 4, 3), dtype=np.uint8)
    large = frames.repeat(4, axis=1).repeat(4, axis=2)
    write_video([large.tobytes()], path, height=size, width=size, fps=fps, crf=18)


def result_of(
    dimension: str, scores: list[list[float | None]], group: str = "", reason: str = "failed", plan: str = "plan"
) -> DimensionResult:
    """A result from scores by prompt and sample; None is a video without one."""
    videos = [
        VideoScore(
            prompt=f"prompt {row}",
            sample=sample,
            group=group or dimension,
            score=score,
            reason="" if score is not None else reason,
        )
        for row, samples in enumerate(scores)
        for sample, score in enumerate(samples)
    ]
    counted = [video for video in videos if video.is_counted]
    raw = sum(video.score or 0.0 for video in counted) / len(counted)
    return DimensionResult(
        dimension=dimension,
        raw=raw,
        evaluator_raw=raw,
        videos=videos,
        num_videos=len(counted),
        num_failed=sum(video.score is None for video in counted),
        plan_sha256=plan,
    )
