"""Looking at planned videos: every kind of trouble gets its own verdict."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from vbench_cases import draw_video

from codmd_serve.errors import ConfigError
from distill.evaluate.vbench.check import Probe, check_videos, probe
from distill.evaluate.vbench.generate import GENERATION_NAME, LEDGER_NAME, VIDEOS_NAME
from distill.evaluate.vbench.manifest import Plan

Filled = Callable[..., tuple[Path, Plan]]


def test_probe_reads_size_frames_and_rate(tmp_path: Path) -> None:
    draw_video(tmp_path / "a.mp4", 1, num_frames=5, size=32, fps=12)
    found = probe(tmp_path / "a.mp4")
    assert isinstance(found, Probe)
    assert (found.width, found.height, found.num_frames, found.fps) == (32, 32, 5, pytest.approx(12))


def test_check_finds_nothing_wrong_with_a_whole_set(filled: Filled) -> None:
    folder, plan = filled()
    verdicts = check_videos(folder, plan)
    assert verdicts.is_clean and len(verdicts.good) == 12
    assert verdicts.lines() == ["12 of 12 planned videos are good"]


def test_check_gives_every_planned_video_a_verdict(filled: Filled) -> None:
    folder, plan = filled()
    videos = folder / VIDEOS_NAME
    names = [video.file for _, video in plan.videos()]
    (videos / names[0]).unlink()
    (videos / names[1]).unlink()
    (folder / LEDGER_NAME).write_text(json.dumps({"file": names[1], "status": "failed", "message": "no memory"}) + "\n")
    (videos / names[2]).write_bytes((videos / names[2]).read_bytes()[:700])
    (videos / names[3]).write_bytes(b"")
    draw_video(videos / names[4], 4, num_frames=4)
    draw_video(videos / names[5], 5, fps=9)
    draw_video(videos / names[6], 6, size=32)
    (videos / names[8]).write_bytes((videos / names[7]).read_bytes())
    (videos / "holiday.mp4").write_bytes(b"x")
    (folder / GENERATION_NAME).write_text(json.dumps({"width": 16, "height": 16, "num_frames": 3, "fps": 8}))
    verdicts = check_videos(folder, plan)
    assert verdicts.missing == [names[0]] and verdicts.failed == {names[1]: "no memory"}
    assert list(verdicts.damaged) == names[2:7]
    assert verdicts.damaged[names[4]] == "num_frames 4, expected 3"
    assert verdicts.damaged[names[5]] == "fps 9.000, expected 8"
    assert verdicts.damaged[names[6]] == "width 32, expected 16"
    assert verdicts.twins == [(names[7], names[8])] and verdicts.strangers == ["holiday.mp4"]
    counted = len(verdicts.good) + len(verdicts.missing) + len(verdicts.failed) + len(verdicts.damaged)
    assert counted == len(names) and not verdicts.is_clean
    assert verdicts.lines()[0] == "5 of 12 planned videos are good"


def test_check_without_a_record_takes_the_first_video_as_the_measure(filled: Filled) -> None:
    folder, plan = filled()
    draw_video(folder / VIDEOS_NAME / "0003-01.mp4", 5, num_frames=4)
    assert check_videos(folder, plan).damaged == {"0003-01.mp4": "num_frames 4, expected 3"}


def test_check_sees_a_frame_that_cannot_be_decoded(filled: Filled) -> None:
    folder, plan = filled("scene")
    path = folder / VIDEOS_NAME / "0002-00.mp4"
    draw_video(path, 1, num_frames=9, size=64)
    draw_video(folder / VIDEOS_NAME / "0002-01.mp4", 2, num_frames=9, size=64)
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half:] = bytes(byte ^ 0x5A for byte in data[half:])
    path.write_bytes(data)
    assert list(check_videos(folder, plan).damaged) == [path.name]


def test_check_refuses_files_that_differ_only_in_case(filled: Filled) -> None:
    folder, plan = filled("scene")
    for name in ("A Fantasy-0.mp4", "a fantasy-0.mp4"):
        (folder / VIDEOS_NAME / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"differ only in case.*'A Fantasy-0\.mp4' and 'a fantasy-0\.mp4'"):
        check_videos(folder, plan)


def test_check_says_what_makes_the_folder(planned: Filled) -> None:
    folder, plan = planned("scene")
    with pytest.raises(ConfigError, match="eval vbench generate"):
        check_videos(folder, plan)


def test_check_refuses_a_damaged_ledger(filled: Filled) -> None:
    folder, plan = filled("scene")
    (folder / LEDGER_NAME).write_text('{"file": "0002-00.mp4"\n')
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        check_videos(folder, plan)
