"""temporal_flickering by the real vbench package: `make vbench-check`."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from codmd_serve.video import find_ffmpeg, write_video
from distill.cli import main
from distill.evaluate.vbench.facts import DIMENSIONS, PRESETS
from distill.evaluate.vbench.generate import VIDEOS_NAME
from distill.evaluate.vbench.manifest import make_plan, read_plan, write_plan
from distill.evaluate.vbench.results import read_results
from distill.evaluate.vbench.suite import find_suite, read_suite

pytestmark = pytest.mark.vbench
FLICKER = "temporal_flickering"
SIZE, NUM_FRAMES = 64, 9


def decoded(path: Path) -> np.ndarray:
    """Frames of a video as uint8 (F, H, W, 3)."""
    command = [find_ffmpeg(), "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "bgr24", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(data, np.uint8).reshape(-1, SIZE, SIZE, 3)


def test_the_official_list_is_the_one_that_the_facts_describe() -> None:
    suite = read_suite(find_suite(None))
    assert suite.is_official and (suite.num_entries, len(suite.prompts)) == (946, 944)
    for name, dimension in DIMENSIONS.items():
        assert sum(name in prompt.dimensions for prompt in suite.prompts) == dimension.num_prompts
    plan = make_plan(suite, PRESETS["vbench"])
    assert len(list(plan.videos())) == 6220
    assert len(list(make_plan(suite, PRESETS["vbench"], flicker_samples=5).videos())) == 4720
    assert len(make_plan(suite, PRESETS["mlperf"]).prompts) == 248
    assert {"A fantasy landscape", "a fantasy landscape"} < {prompt.text for prompt in plan.prompts}


def test_the_real_evaluator_scores_the_planned_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    plan = make_plan(read_suite(find_suite(None)), PRESETS["vbench"], dimensions=[FLICKER], flicker_samples=1)
    write_plan(plan, folder)
    videos = folder / VIDEOS_NAME
    videos.mkdir()
    for number, (_, video) in enumerate(read_plan(folder).videos()):
        # From still to flickering by 40 levels.
        rng = np.random.default_rng(number)
        still = np.broadcast_to(rng.integers(60, 180, 3), (NUM_FRAMES, SIZE, SIZE, 3))
        swing = rng.integers(-1, 2, (NUM_FRAMES, 1, 1, 1)) * 40 * number / 75
        frames = np.clip(still + swing, 0, 255).astype(np.uint8)
        write_video([frames.tobytes()], videos / video.file, height=SIZE, width=SIZE, fps=8, crf=10)
    assert main(["eval", "vbench", "run", str(folder)]) == 0
    assert "| temporal_flickering |" in capsys.readouterr().out
    result = read_results(folder)[FLICKER]
    assert (result.num_videos, result.num_failed) == (75, 0) and result.evaluator["vbench"] == "0.1.5"
    ours = []
    for _, video in read_plan(folder).videos():
        frames = decoded(videos / video.file).astype(float)
        ours.append(1 - np.abs(np.diff(frames, axis=0)).mean() / 255)
    # OpenCV and ffmpeg convert YUV to BGR with different rounding: up to a level of 255.
    assert [video.score for video in result.videos] == pytest.approx(ours, abs=1 / 255)
    assert result.raw == pytest.approx(np.mean(ours), abs=1 / 255) and np.ptp(ours) > 0.05
