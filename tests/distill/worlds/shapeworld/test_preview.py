"""`codmd-distill shapeworld preview`: two real files, or one clear line and exit code 2."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from distill.cli import main


def decode(path: Path) -> np.ndarray:
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        str(path),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    return np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8)


def test_preview_writes_a_sheet_and_a_video(tmp_path: Path) -> None:
    assert main(["shapeworld", "preview", "--out", str(tmp_path / "look" / "world"), "--num-clips", "5"]) == 0
    sheet = np.asarray(Image.open(tmp_path / "look" / "world.png"))
    assert sheet.shape[2] == 3 and sheet.std() > 20
    num_frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "look" / "world.mp4"))
    assert num_frames == 25 and abs(seconds - 25 / 16) < 0.05
    assert decode(tmp_path / "look" / "world.mp4").size == 25 * 192 * 288 * 3


def test_preview_shows_the_given_captions(tmp_path: Path) -> None:
    caption = "a blue square stays still on a gray background"
    assert main(["shapeworld", "preview", "--out", str(tmp_path / "one"), "--caption", caption]) == 0
    frame = decode(tmp_path / "one.mp4").reshape(-1, 96, 96, 3)[0].astype(int)
    is_blue = (frame[..., 2] > 180) & (frame[..., 0] < 110)
    assert 400 < is_blue.sum() < 1400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption", "a dog"], "no 'colour shape' pair"),
        (["--num-clips", "0"], "--num-clips must be in 1..256"),
        (["--out", "/dev/null/world"], "cannot be written"),
    ],
)
def test_preview_says_in_one_line_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shapeworld", "preview", "--out", str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("codmd-distill: ") and message in error and "\n" not in error
    assert not (tmp_path / "x.mp4").exists()
