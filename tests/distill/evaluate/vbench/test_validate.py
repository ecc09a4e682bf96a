"""VBench as the command of a validation: prompts of a plan out, videos in, numbers out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from vbench_cases import draw_video

from distill.cli import main
from distill.evaluate.vbench.manifest import Plan

Planned = Callable[..., tuple[Path, Plan]]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """What a validation leaves: videos in an order of its own, and their prompts."""
    folder = tmp_path / "videos"
    folder.mkdir()
    prompts = ["a red ring", "not of the plan", "../../a red circle/../moves"]
    entries = [{"file": f"{row:05d}.mp4", "prompt": text, "seed": 0} for row, text in enumerate(prompts)]
    (folder / "prompts.json").write_text(json.dumps(entries))
    for row, entry in enumerate(entries):
        draw_video(folder / entry["file"], row)
    return folder


def test_a_plan_gives_the_prompts_and_its_dimensions_score_the_videos(
    planned: Planned, videos: Path, fake_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = planned("scene", "overall_consistency", samples=1)
    command = ["eval", "vbench", "validate", str(folder)]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == ["../../a red circle/../moves", "a red ring"]
    for _ in range(2):  # the second validation is scored anew
        assert main([*command, str(videos), str(videos / "prompts.json"), "--python", str(fake_python)]) == 0
        values = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert values.keys() == {"scene", "overall_consistency", "mean"}
        assert values["mean"] == pytest.approx((values["scene"] + values["overall_consistency"]) / 2)
    assert not (folder / "videos").exists() and not (folder / "results").exists()


def test_prompts_without_a_video_and_plans_of_many_videos_are_refused(
    planned: Planned, videos: Path, fake_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (videos / "prompts.json").write_text('[{"file": "00000.mp4", "prompt": "a red ring"}]')
    folder, _ = planned("scene", "overall_consistency", samples=1)
    assert main(["eval", "vbench", "validate", str(folder), str(videos)]) == 2
    assert "1 of 2 prompts of" in capsys.readouterr().err
    (videos / "prompts.json").write_text('["a red ring"]')
    assert main(["eval", "vbench", "validate", str(folder), str(videos)]) == 2
    assert "must be a list of" in capsys.readouterr().err
    folder, _ = planned("scene", name="many", samples=2)
    assert main(["eval", "vbench", "validate", str(folder)]) == 2
    assert "plans several videos of a prompt" in capsys.readouterr().err
