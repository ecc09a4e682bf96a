"""`codmd-distill shapeworld preview`: two real files, or one clear line and exit code 2."""

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from distill.cli import main


def test_preview_writes_a_sheet_and_a_video(tmp_path: Path) -> None:
    assert main(["shapeworld", "preview", "--out", str(tmp_path / "look" / "world"), "--num-clips", "5"]) == 0
    sheet = np.asarray(Image.open(tmp_path / "look" / "world.png"))
    assert sheet.shape[2] == 3 and sheet.std() > 20
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "look" / "world.mp4"))
    info = next(reader)
    frames = list(reader)
    assert info["size"] == (192, 128) and info["fps"] == 16 and len(frames) == 17


def test_preview_shows_the_given_captions(tmp_path: Path) -> None:
    caption = "a blue square stays still on a gray background"
    assert main(["shapeworld", "preview", "--out", str(tmp_path / "one"), "--caption", caption]) == 0
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "one.mp4"))
    next(reader)
    frame = np.frombuffer(next(reader), np.uint8).reshape(64, 64, 3).astype(int)
    is_blue = (frame[..., 2] > 180) & (frame[..., 0] < 110)
    assert 100 < is_blue.sum() < 600


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
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "x.mp4").exists()
