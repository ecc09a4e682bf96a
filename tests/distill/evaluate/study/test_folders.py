"""What is wrong with the arms of a study: everything is found, and everything is said."""

import shutil
from pathlib import Path

import pytest
from studies import PROMPTS, write_arms, write_clip

from codmd_serve.errors import ConfigError
from distill.evaluate.study.design import Item
from distill.evaluate.study.folders import compare_arms, read_prompt_items


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, Path]:
    return write_arms(tmp_path, "a", "b")


def test_equal_arms_have_no_problem(arms: dict[str, Path]) -> None:
    (arms["a"] / "notes.txt").write_text("not a video")
    (arms["a"] / ".hidden.mp4").write_text("not ours")
    comparison = compare_arms(arms)
    assert comparison.problems == ()
    assert [item.prompt for item in comparison.items] == sorted(PROMPTS)
    video = comparison.videos["b"]["a red circle-0"]
    assert str(video.clip) == "48x48, 8 frames at 16 fps" and video.clip.duration_s == 0.5


def test_every_problem_is_in_the_list(arms: dict[str, Path]) -> None:
    a, b = arms["a"], arms["b"]
    names = [f"{prompt}-0" for prompt in (*PROMPTS, *(f"extra {number}" for number in range(6)))]
    for number, name in enumerate(names[3:]):
        for index, folder in enumerate((a, b)):
            write_clip(folder / f"{name}.mp4", 10 + 2 * number + index)
    (a / f"{names[0]}.mp4").unlink()
    (b / f"{names[1]}.mp4").write_bytes(b"")
    whole = (b / f"{names[2]}.mp4").read_bytes()
    (b / f"{names[2]}.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (b / f"{names[3]}.mp4").write_text("#EXTM3U\nhttp://example.org/secret.ts\n")
    write_clip(b / f"{names[4]}.mp4", 60, size=64)
    write_clip(b / f"{names[5]}.mp4", 61, num_frames=9)
    write_clip(b / f"{names[6]}.mp4", 62, fps=8)
    shutil.copy(a / f"{names[7]}.mp4", b / f"{names[7]}.mp4")
    shutil.copy(a / f"{names[8]}.mp4", a / f"{names[8]}.mov")
    write_clip(b / "one frame.mp4", 20, num_frames=1)
    problems = compare_arms(arms).problems
    expected = [
        ("a: extra 5-0.mov and extra 5-0.mp4 are two videos of one prompt",),
        ("a: no video of 'a red circle-0'",),
        ("a: no video of 'one frame'",),
        ("b: a blue ring-0.mp4 cannot be played: the file is empty",),
        ("b: a white triangle-0.mp4 cannot be played: ",),
        ("b: extra 0-0.mp4 cannot be played: ",),
        ("b: one frame.mp4 cannot be played: it has 1 picture,",),
        ("a/extra 4-0.mp4 and b/extra 4-0.mp4 show the same pictures",),
        ("'extra 1-0' is unequal: a has 48x48, 8 frames at 16 fps, b has 64x64, 8 frames at 16 fps",),
        ("'extra 2-0' is unequal: ", "9 frames"),
        ("'extra 3-0' is unequal: ", "at 8 fps"),
    ]
    assert len(problems) == len(expected), problems
    for problem, (start, *parts) in zip(problems, expected, strict=True):
        assert problem.startswith(start) and all(part in problem for part in parts), problem


def test_same_pictures_in_another_file_are_a_duplicate(arms: dict[str, Path]) -> None:
    source = arms["a"] / "a red circle-0.mp4"
    # Other bytes, the same pictures: a box that players skip.
    (arms["a"] / "a blue ring-0.mp4").write_bytes(source.read_bytes() + b"\0\0\0\x08free")
    assert compare_arms(arms).problems == ("a/a blue ring-0.mp4 and a/a red circle-0.mp4 show the same pictures",)


def test_one_arm_no_folder_and_the_same_folder_twice(arms: dict[str, Path], tmp_path: Path) -> None:
    assert compare_arms({"a": arms["a"]}).problems == ("a study compares two arms or more, got 1: a",)
    assert compare_arms({}).problems == ("a study compares two arms or more, got 0: none",)
    gone = compare_arms({**arms, "c": tmp_path / "nowhere"}).problems
    assert gone == (f"c: there is no folder {tmp_path / 'nowhere'}",)
    (tmp_path / "empty").mkdir()
    (empty,) = compare_arms({**arms, "c": tmp_path / "empty"}).problems
    assert empty.startswith("c: the folder") and "holds no video" in empty
    (tmp_path / "link").symlink_to(arms["a"])
    twice = compare_arms({**arms, "c": tmp_path / "link"}).problems
    assert "a and c are the same folder" in twice[0] and len(twice) == 1 + 3


def test_prompts_of_a_file_have_to_fit_the_videos(arms: dict[str, Path]) -> None:
    items = tuple(Item(f"{prompt}-0", "a text") for prompt in (*PROMPTS[:2], "a green cross"))
    assert compare_arms(arms, items).problems == (
        "a: no video of 'a green cross-0'",
        "a: a white triangle-0.mp4 has no prompt",
        "b: no video of 'a green cross-0'",
        "b: a white triangle-0.mp4 has no prompt",
    )


def test_prompt_file_of_lines_and_of_names(tmp_path: Path) -> None:
    lines, names = tmp_path / "prompts.txt", tmp_path / "prompts.json"
    lines.write_text("a red circle\r\n\n  a blue\u00a0ring \n")
    assert read_prompt_items(lines) == (Item("0000", "a red circle"), Item("0001", "a blue ring"))
    assert [item.name for item in read_prompt_items(lines, 2)] == ["0000-0", "0000-1", "0001-0", "0001-1"]
    names.write_text('{"two.mp4": "a blue ring", "one": "a red circle"}')
    assert read_prompt_items(names) == (Item("one", "a red circle"), Item("two", "a blue ring"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.json", "{}", "holds no prompt"),
        ("p.json", "[1]", "one JSON object"),
        ("p.json", '{"a": 1}', "one JSON object"),
        ("p.json", '{"a": " "}', "is blank"),
        ("p.json", '{"../a": "x"}', "cannot be the name of a file"),
        ("p.json", '{"": "x"}', "cannot be the name of a file"),
        ("p.json", "{", "cannot be read as JSON"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompt_items(tmp_path / name)
