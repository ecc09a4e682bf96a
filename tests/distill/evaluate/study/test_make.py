"""The folder of a study: copies that tell nothing, catch trials that everybody sees, and all of it or nothing."""

import re
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from studies import make_study, write_arms, write_clip

from codmd_serve.errors import ConfigError, GenerationError
from codmd_serve.video import find_ffmpeg
from distill.evaluate.study.design import BROKEN, MISMATCHED, VIDEO_DIR, file_name, read_study
from distill.evaluate.study.folders import compare_arms
from distill.evaluate.study.make import StudyOptions, build_study, check_out, plan_study
from distill.evaluate.study.media import break_clip, copy_clip, equalise_sizes, inspect_clip


def test_study_has_all_copies_and_two_kinds_of_catch_trials(tmp_path: Path) -> None:
    study = make_study(tmp_path, "ours", "theirs")
    folder = tmp_path / "study"
    assert read_study(folder) == study
    assert [catch.kind for catch in study.catches] == [BROKEN, MISMATCHED] and study.num_repeats == 2
    expected = {file_name(study, item, arm) for item in range(3) for arm in study.arms}
    expected |= {file_name(study, catch.item, catch.kind, number) for number, catch in enumerate(study.catches)}
    assert {path.name for path in (folder / VIDEO_DIR).iterdir()} == expected
    for item in range(3):
        names = [file_name(study, item, arm) for arm in study.arms]
        names += [file_name(study, item, c.kind, number) for number, c in enumerate(study.catches) if c.item == item]
        assert len({(folder / VIDEO_DIR / name).stat().st_size for name in names}) == 1
    (mismatched,) = [catch for catch in study.catches if catch.kind == MISMATCHED]
    assert study.items[mismatched.item].prompt != study.items[mismatched.other_item].prompt


def test_no_file_of_the_videos_tells_where_it_came_from(tmp_path: Path) -> None:
    """The sources carry `made by ARM` as a comment; copies carry no metadata at all."""
    make_study(tmp_path, "ours", "theirs")
    source = next((tmp_path / "arms" / "ours").iterdir()).read_bytes()
    assert b"made by ours" in source
    headers = set()
    for path in (tmp_path / "study" / VIDEO_DIR).iterdir():
        data = path.read_bytes()
        for word in (b"ours", b"theirs", b"made by", b"Lavf"):
            assert word not in data
        headers |= set(re.findall(rb"x264 - core[^\0]*", data))
    assert len({re.sub(rb"crf=\d+", b"", header) for header in headers}) == 1, "one encoder, one setting"


def test_copies_look_as_their_sources_and_broken_ones_do_not(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 3)
    clip = inspect_clip(tmp_path / "a.mp4")
    copy_clip(tmp_path / "a.mp4", clip, tmp_path / "copy.mp4")
    break_clip(tmp_path / "a.mp4", clip, tmp_path / "broken.mp4")
    equalise_sizes([tmp_path / "copy.mp4", tmp_path / "broken.mp4"])
    copied, broken = (inspect_clip(tmp_path / f"{name}.mp4") for name in ("copy", "broken"))
    shapes = {(each.width, each.height, each.num_frames, each.fps) for each in (clip, copied, broken)}
    assert shapes == {(48, 48, 8, Fraction(16))}
    assert error(tmp_path / "a.mp4", tmp_path / "copy.mp4") < 3.0
    assert error(tmp_path / "a.mp4", tmp_path / "broken.mp4") > 15.0


def error(first: Path, second: Path) -> float:
    """Mean absolute difference of all pixels, 0..255."""
    clips = []
    for path in (first, second):
        command = [find_ffmpeg(), "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        clips.append(np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8))
    return float(np.abs(clips[0].astype(float) - clips[1].astype(float)).mean())


def test_odd_sizes_and_other_containers_are_copied(tmp_path: Path) -> None:
    write_clip(tmp_path / "even.mp4", 3)
    command = [find_ffmpeg(), "-v", "error", "-i", tmp_path / "even.mp4", "-vf", "scale=47:45"]
    subprocess.run([*command, tmp_path / "odd.gif"], check=True)
    clip = inspect_clip(tmp_path / "odd.gif")
    assert (clip.width, clip.height, clip.num_frames) == (47, 45, 8)
    copy_clip(tmp_path / "odd.gif", clip, tmp_path / "copy.mp4")
    copied = inspect_clip(tmp_path / "copy.mp4")
    assert (copied.width, copied.height, copied.num_frames) == (48, 46, 8)


def test_copy_of_what_is_no_video_fails_with_the_cause(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 3)
    clip = inspect_clip(tmp_path / "a.mp4")
    (tmp_path / "bad.mp4").write_text("no video")
    with pytest.raises(GenerationError, match=r"bad.mp4 cannot be copied: .*moov"):
        copy_clip(tmp_path / "bad.mp4", clip, tmp_path / "copy.mp4")


def test_failed_build_leaves_no_study(tmp_path: Path) -> None:
    folders = write_arms(tmp_path / "arms", "a", "b")
    comparison = compare_arms(folders)
    study = plan_study(("a", "b"), comparison, StudyOptions())
    next(folders["b"].iterdir()).write_text("gone bad since")
    with pytest.raises(GenerationError):
        build_study(study, comparison, tmp_path / "out" / "study")
    assert list((tmp_path / "out").iterdir()) == []


def test_folder_that_holds_anything_is_not_overwritten(tmp_path: Path) -> None:
    make_study(tmp_path, "a", "b")
    with pytest.raises(ConfigError, match="holds a study already"):
        check_out(tmp_path / "study")
    with pytest.raises(ConfigError, match="holds something already"):
        check_out(tmp_path / "arms")
    with pytest.raises(ConfigError, match="holds something already"):
        check_out(tmp_path / "study" / "study.json")
    check_out(tmp_path / "new")


def test_plan_takes_options(tmp_path: Path) -> None:
    comparison = compare_arms(write_arms(tmp_path, "a", "b", "c"))
    arms = ("a", "b", "c")
    study = plan_study(arms, comparison, StudyOptions(pairs_per_rater=4, num_catches=0, num_repeats=1))
    assert (study.num_pairs, study.pairs_per_rater, study.num_trials) == (9, 4, 5)
    assert plan_study(arms, comparison, StudyOptions()).num_trials == 9 + 2 + 2
    for options in (StudyOptions(pairs_per_rater=10), StudyOptions(num_catches=-1), StudyOptions(num_repeats=-1)):
        with pytest.raises(ConfigError):
            plan_study(arms, comparison, options)
