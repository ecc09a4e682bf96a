"""Frames to mp4, gif and WebP: what comes back out, the same bytes every time, and nothing on disk after a failure."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from codmd_serve import service_time, video
from codmd_serve.errors import CancelledError, ConfigError, GenerationError
from codmd_serve.video import check_encoder, find_ffmpeg, format_of, has_webp_encoder, write_video

ReadVideo = Callable[[Path], Any]
HEIGHT, WIDTH, FRAMES, FPS = 32, 48, 9, 16


def clip() -> npt.NDArray[np.uint8]:
    """Frames whose left half turns from black to red and whose right half is blue."""
    frames = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, :, : WIDTH // 2, 0] = np.linspace(0, 255, FRAMES).astype(np.uint8)[:, None, None]
    frames[:, :, WIDTH // 2 :, 2] = 200
    return frames


def encode(
    path: Path,
    frames: Iterator[bytes] | list[bytes] | None = None,
    crf: int = 10,
    comment: str = "",
    on_wait: Callable[[], None] | None = None,
    format: str = "mp4",
    fps: int = FPS,
) -> Path:
    chunks = [clip().tobytes()] if frames is None else frames
    settings = {"height": HEIGHT, "width": WIDTH, "fps": fps, "crf": crf, "comment": comment, "format": format}
    write_video(chunks, path, on_wait=on_wait, **settings)  # type: ignore[arg-type]
    return path


def test_write_video_keeps_size_rate_count_and_colours(tmp_path: Path, read_video: ReadVideo) -> None:
    frames, fps, stream = read_video(encode(tmp_path / "a.mp4", crf=1))
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert fps == FPS and "yuv420p(tv, bt709" in stream
    # Away from the edge, where halved colour resolution mixes the sides; 6 levels are what 8-bit YUV rounds away.
    inner = [slice(4, 20), slice(28, 44)]
    for columns in inner:
        difference = frames[:, :, columns].astype(int) - clip()[:, :, columns]
        assert abs(difference).max() <= 6


def test_write_video_gives_the_same_bytes_however_frames_are_chunked(tmp_path: Path) -> None:
    whole = encode(tmp_path / "a.mp4").read_bytes()
    assert encode(tmp_path / "b.mp4").read_bytes() == whole
    assert encode(tmp_path / "c.mp4", [frame.tobytes() for frame in clip()]).read_bytes() == whole


def test_write_video_spends_fewer_bytes_at_a_higher_crf(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, clip().shape, np.uint8).tobytes()
    sizes = [encode(tmp_path / f"{crf}.mp4", [noise], crf).stat().st_size for crf in (1, 51)]
    assert sizes[0] > 4 * sizes[1]


def test_write_video_stores_the_comment(tmp_path: Path) -> None:
    comment = json.dumps({"prompt": "a = b; \"c\" \u00e9 'd' " + "long " * 800, "seed": 7})
    path = encode(tmp_path / "a.mp4", comment=comment)
    said = subprocess.run([find_ffmpeg(), "-i", path, "-f", "ffmetadata", "-"], capture_output=True, check=True).stdout
    # ffmetadata escapes what is special to itself.
    assert comment in said.decode().replace("\\\\", "\0").replace("\\", "").replace("\0", "\\")


@pytest.mark.parametrize("name", ["a:b.mp4", "-y.mp4", "50%d.mp4", "a b'c.mp4", "noending"])
def test_write_video_takes_any_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_video: ReadVideo, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    encode(Path(name))
    assert len(read_video(tmp_path / name).frames) == FRAMES
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [ValueError, BrokenPipeError, KeyboardInterrupt])
def test_write_video_leaves_the_old_file_when_the_frames_fail(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def frames() -> Iterator[bytes]:
        yield clip()[:4].tobytes()
        raise error("no more")

    with pytest.raises(error, match="no more"):
        encode(path, frames())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def fake_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))


def is_gone(group: int) -> bool:
    """Whether a process group is dead, waiting for it; what nobody has collected yet counts as dead."""
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        stats = [stat.rpartition(")")[2].split() for stat in map(_stat, Path("/proc").glob("[0-9]*")) if stat]
        if not any(int(fields[2]) == group and fields[0] != "Z" for fields in stats):
            return True
    return False


def _stat(process: Path) -> str:
    try:
        return (process / "stat").read_text()
    except OSError:  # it ended meanwhile
        return ""


def test_write_video_says_why_ffmpeg_gave_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, "echo first >&2; echo Unknown encoder >&2; exit 1")
    # More than a pipe holds, so that the writer meets the closed end.
    frames = (clip().tobytes() for _ in range(100))
    with pytest.raises(GenerationError, match="ffmpeg failed: Unknown encoder") as caught:
        encode(tmp_path / "out" / "a.mp4", frames)
    assert caught.value.code == "encode_failed"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 228", "storage_full"),
        ("echo 'Error writing trailer: No space left on device' >&2; exit 1", "storage_full"),
        ("echo '/a/path/out.mp4: Read-only file system' >&2; exit 1", "storage_unwritable"),
    ],
)
def test_write_video_tells_a_full_or_closed_disk_from_a_failing_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: str
) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, script)
    with pytest.raises(GenerationError, match="the server") as caught:
        encode(tmp_path / "out" / "a.mp4")
    assert caught.value.code == code and "/" not in str(caught.value)


def test_write_video_says_so_when_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(GenerationError, match="the server cannot write videos: File exists") as caught:
        encode(tmp_path / "out" / "a.mp4")
    assert caught.value.code == "storage_unwritable"


def test_write_video_says_so_when_ffmpeg_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    with pytest.raises(GenerationError, match="no working ffmpeg") as caught:
        encode(tmp_path / "a.mp4")
    assert caught.value.code == "encoder_missing" and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("script", ["sleep 1000", "cat > /dev/null; sleep 1000"], ids=["at once", "at the end"])
def test_write_video_kills_an_ffmpeg_that_never_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; {script}")
    monkeypatch.setattr(service_time, "MIN_ENCODER_WAIT_S", 0.5)
    monkeypatch.setattr(service_time, "MIN_ENCODED_PX_PER_S", 1e9)
    frames = (clip().tobytes() for _ in range(100))  # more than a pipe holds
    with pytest.raises(GenerationError, match="made no progress") as caught:
        encode(tmp_path / "out" / "a.mp4", frames)
    assert caught.value.code == "encoder_hung"
    assert is_gone(int((tmp_path / "pid").read_text())), "with the `sleep` that it started"


def test_what_is_raised_while_ffmpeg_ends_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; cat > /dev/null; sleep 1000")

    def cancel() -> None:
        raise CancelledError("enough")

    with pytest.raises(CancelledError):
        encode(tmp_path / "a.mp4", on_wait=cancel)
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_a_cancellation_counts_until_the_file_appears(tmp_path: Path) -> None:
    calls: list[bool] = []
    path = encode(tmp_path / "a.mp4", on_wait=lambda: calls.append((tmp_path / "a.mp4").exists()))
    assert path.exists() and calls[-1] is False, "the last question comes before the file"

    def cancel() -> None:
        raise CancelledError("enough")

    with pytest.raises(CancelledError):
        encode(tmp_path / "b.mp4", on_wait=cancel)
    assert list(tmp_path.iterdir()) == [path]


DYING = """
import os, signal, sys, threading
from pathlib import Path
from codmd_serve.video import write_video
def frames():
    yield bytes(48 * 32 * 3)
    while not Path(sys.argv[1], "pid").exists():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
write_video(frames(), Path(sys.argv[1], "a.mp4"), height=32, width=48, fps=16, crf=18)
"""


def test_ffmpeg_dies_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One that hangs: the end of its input would not end it.
    fake_ffmpeg(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 1000")
    done = subprocess.run([sys.executable, "-c", DYING, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert is_gone(int((tmp_path / "pid").read_text())), "ffmpeg outlives its parent"


def test_write_video_removes_what_a_failing_ffmpeg_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, 'for last; do :; done; echo half > "$last"; cat > /dev/null; exit 3')
    (tmp_path / "out").mkdir()
    with pytest.raises(GenerationError, match="ffmpeg failed: 3"):
        encode(tmp_path / "out" / "a.mp4")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("exists", [True, False])
def test_find_ffmpeg_refuses_one_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    program = tmp_path / "ffmpeg"
    if exists:
        program.write_text("not a program")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(ConfigError, match=f"no ffmpeg at {program}: reinstall imageio-ffmpeg"):
        find_ffmpeg()


def test_find_ffmpeg_says_so_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(ConfigError, match="no ffmpeg: reinstall"):
        find_ffmpeg()


def test_find_ffmpeg_gives_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    assert os.access(find_ffmpeg(), os.X_OK)


def encoder_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, failure: str = "") -> None:
    """An ffmpeg that lists these encoders and cannot use others, as one that was built without libx264."""
    listed = "".join(f"echo ' V....D {name}   codec {name}'; " for name in names.split())
    encode = f"cat > /dev/null; printf '{failure}' >&2; exit 1"
    fake_ffmpeg(tmp_path, monkeypatch, f'case "$*" in *-encoders*) {listed};; *) {encode};; esac')


def test_an_ffmpeg_without_libx264_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder_list(tmp_path, monkeypatch, "mpeg4 libx265")
    with pytest.raises(ConfigError, match=r"this ffmpeg has no libx264 \(.*ffmpeg\): unset IMAGEIO_FFMPEG_EXE"):
        check_encoder(find_ffmpeg())
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    check_encoder(find_ffmpeg())


def test_an_ffmpeg_that_does_not_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, "echo 'libavcodec.so.60: cannot open shared object file' >&2; exit 127")
    with pytest.raises(ConfigError, match=r"no libx264: libavcodec.so.60: cannot open shared object file"):
        check_encoder(find_ffmpeg())


NO_ENCODER = "[vost#0:0 @ 0x55a] Unknown encoder 'libx264'\nError opening output file a.mp4.\nEncoder not found\n"
BROKEN = "[mp4 @ 0x5] deprecated pixel format\n[out#0 @ 0x5] Error writing: out of luck\nConversion failed!\n"
FAILURES = {
    NO_ENCODER: ("encoder_missing", "the server's ffmpeg has no libx264"),
    BROKEN: ("encode_failed", "ffmpeg failed: Error writing: out of luck$"),
    "first\nsecond\n": ("encode_failed", "ffmpeg failed: first$"),
}


@pytest.mark.parametrize("said", FAILURES)
def test_the_line_that_names_the_cause_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    code, message = FAILURES[said]
    encoder_list(tmp_path, monkeypatch, "mpeg4", said.replace("\n", "\\n").replace("'", "'\"'\"'"))
    (tmp_path / "out").mkdir()
    with pytest.raises(GenerationError, match=message) as caught:
        encode(tmp_path / "out" / "a.mp4")
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["a.mp4", "a.MP4", "a.m4v", "a", ".mp4", "a.b.mp4"])
def test_names_of_an_mp4_are_taken(name: str) -> None:
    assert format_of(Path(name)) == "mp4"


@pytest.mark.parametrize("name", ["out.webm", "out.png", "out.MKV", "out.mp4.png"])
def test_a_suffix_of_another_format_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has the suffix .*: only mp4, gif and webp .*; name it out.*mp4"):
        format_of(Path(name))


def animation(path: Path) -> tuple[list[npt.NDArray[np.uint8]], int, int]:
    """Frames of an animated picture, milliseconds in all, and how often it plays (0 is for ever)."""
    frames, total_ms = [], 0
    with Image.open(path) as picture:
        for number in range(picture.n_frames):  # type: ignore[attr-defined]
            picture.seek(number)
            picture.load()
            total_ms += picture.info["duration"]
            frames.append(np.asarray(picture.convert("RGB")))
        return frames, total_ms, picture.info["loop"]


@pytest.mark.parametrize(
    ("format", "begin", "inside"), [("gif", b"GIF89a", b"NETSCAPE2.0"), ("webp", b"RIFF", b"WEBPVP8X")]
)
@pytest.mark.parametrize("fps", [FPS, 30])
def test_animated_pictures_keep_frames_time_and_colours(
    tmp_path: Path, format: str, begin: bytes, inside: bytes, fps: int
) -> None:
    path = encode(tmp_path / "a", format=format, fps=fps)
    data = path.read_bytes()
    assert data.startswith(begin) and inside in data[:1000]
    frames, total_ms, num_plays = animation(path)
    assert len(frames) == FRAMES and num_plays == 0
    assert total_ms == pytest.approx(1000 * FRAMES / fps, abs=6), "a gif counts in hundredths of a second"
    for columns in (slice(4, 20), slice(28, 44)):
        difference = np.stack(frames)[:, :, columns].astype(int) - clip()[:, :, columns]
        assert abs(difference).max() <= 8
    again = encode(tmp_path / "b", [frame.tobytes() for frame in clip()], format=format, fps=fps)
    assert again.read_bytes() == data


def test_webp_spends_fewer_bytes_at_a_higher_crf(tmp_path: Path) -> None:
    noise = [np.random.default_rng(0).integers(0, 255, clip().shape, np.uint8).tobytes()]
    sizes = [encode(tmp_path / "a", noise, crf, format="webp").stat().st_size for crf in (1, 18, 51)]
    assert sizes[0] > 1.2 * sizes[1] > 1.2**2 * sizes[2]


def test_webp_is_written_by_pillow_where_ffmpeg_has_no_libwebp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = find_ffmpeg()
    assert has_webp_encoder(program)
    fake_ffmpeg(tmp_path, monkeypatch, f'for w; do [ "$w" = -encoders ] && exec "{program}" -version; done; exit 9')
    assert not has_webp_encoder(find_ffmpeg())
    frames, total_ms, num_plays = animation(encode(tmp_path / "a.webp", format="webp"))
    assert (len(frames), num_plays) == (FRAMES, 0) and abs(total_ms - 1000 * FRAMES / FPS) < 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.webp", "ffmpeg"]


def test_mp4_has_the_bytes_that_it_had_before_there_were_other_formats(tmp_path: Path) -> None:
    """The command line of ffmpeg is what decides them; they differ between versions of ffmpeg."""
    command = video._command("ffmpeg", Path("a"), height=32, width=48, fps=16, crf=18, comment="c", format="mp4")
    said = " ".join(map(str, command))
    assert said == (
        "ffmpeg -hide_banner -loglevel error -nostdin -y -f rawvideo -pix_fmt rgb24 -s 48x32 -r 16 -i pipe:0 "
        "-vf scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact,"
        "setparams=color_primaries=bt709:color_trc=bt709 -c:v libx264 -preset faster -rc-lookahead 10 -crf 18 "
        "-threads 1 -pix_fmt yuv420p -colorspace bt709 -color_range tv -flags:v +bitexact -fflags +bitexact "
        "-map_metadata -1 -metadata comment=c -movflags +faststart -f mp4 a"
    )


def test_small_pictures_are_encoded_by_one_thread(tmp_path: Path) -> None:
    def threads(height: int, width: int) -> str:
        sizes = {"height": height, "width": width, "fps": 16, "crf": 18, "comment": "c"}
        words = list(map(str, video._command("ffmpeg", Path("a"), **sizes, format="mp4")))  # type: ignore[arg-type]
        return words[words.index("-threads") + 1]

    assert (threads(96, 96), threads(256, 256), threads(256, 272), threads(480, 832)) == ("1", "1", "4", "4")


@pytest.mark.parametrize("name", ["x" * 251 + ".mp4", "ü" * 125 + "x.mp4"])
def test_the_longest_legal_name_is_written(tmp_path: Path, name: str, read_video: Callable[[Path], Any]) -> None:
    assert len(name.encode()) == 255
    encode(tmp_path / name)
    assert read_video(tmp_path / name).frames.shape[0] > 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_cause_is_a_whole_line_whatever_a_path_holds() -> None:
    """ffmpeg ends lines by a return too, and U+2028 ends none."""
    said = "frame=1\rError opening output a\u2028b.mp4: No such file\nConversion failed!\n"
    assert video.cause_of(said) == "Error opening output a\u2028b.mp4: No such file"
