"""uint8 frames to an H.264 mp4, streamed through ffmpeg; knows nothing of tensors or models.

The same frames and settings give the same bytes with the same ffmpeg: no dates, no random identifiers, and a thread
count of our own, because what x264 decides depends on it.
"""

import contextlib
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import imageio_ffmpeg

from codmd_serve.errors import ConfigError, GenerationError
from codmd_serve.files import atomic_file, first_line

NUM_ENCODER_THREADS = 4
CHECK_TIMEOUT_S = 10.0
VIDEO_SUFFIXES = (".mp4", ".m4v")
_FAILURE = re.compile(
    r"error|fail|unknown|unrecogni|invalid|denied|cannot|could not|unable|no such|no space|not ", re.I
)
_NOTICE = re.compile(r"deprecated|^warning|^last message repeated|^conversion failed", re.I)


def find_ffmpeg() -> str:
    """Path of the ffmpeg to use: $IMAGEIO_FFMPEG_EXE, else the one that comes with imageio-ffmpeg, else the system's.

    Raises:
        ConfigError: there is none.
    """
    try:
        program: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        program = ""
    if not program or shutil.which(program) is None:
        named = f" at {program}" if program else ""
        raise ConfigError(
            f"no ffmpeg{named}: reinstall imageio-ffmpeg or let IMAGEIO_FFMPEG_EXE name an ffmpeg program"
        )
    return program


@functools.cache
def check_encoder(program: str) -> None:
    """Refuse an ffmpeg that was built without libx264, as some distributions do for its licence.

    Raises:
        ConfigError: it has no libx264, or cannot be run at all.
    """
    command = [program, "-hide_banner", "-loglevel", "error", "-encoders"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=CHECK_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"ffmpeg {program} cannot be run: {first_line(error)}") from None
    if re.search(rb"(?m)^ V\S* +libx264 ", done.stdout) is None:
        said = cause_of(done.stderr.decode(errors="replace"))
        reason = f": {said}" if said else ""
        raise ConfigError(
            f"this ffmpeg has no libx264{reason} ({program}): unset IMAGEIO_FFMPEG_EXE to use the one that comes with "
            "imageio-ffmpeg, or let it name an ffmpeg that was built with --enable-libx264"
        )


def cause_of(said: str) -> str:
    """Return the line of a program's error output that names the cause: the first that tells of a failure.

    ffmpeg says what is wrong first and then what it gave up for that reason, up to a bare "Conversion failed!".
    """
    lines = [re.sub(r"^\[[^\]]* @ 0x[0-9a-f]+\] *", "", line.strip()) for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if _FAILURE.search(line) and not _NOTICE.search(line)]
    return (telling or lines or [""])[0]


def check_video_name(path: Path) -> None:
    """Refuse a name whose suffix promises another format than the mp4 that is written.

    Raises:
        ConfigError: a suffix other than .mp4 and .m4v; none at all is fine.
    """
    if path.suffix.lower() not in ("", *VIDEO_SUFFIXES):
        raise ConfigError(
            f"{path.name} would hold an mp4 under the suffix {path.suffix}: only mp4 is written; name it "
            f"{path.with_suffix('.mp4').name}, and turn it into another format with ffmpeg"
        )


def write_video(
    frames: Iterable[bytes | memoryview],
    path: Path,
    *,
    height: int,
    width: int,
    fps: int,
    crf: int,
    comment: str = "",
    on_start: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Encode frames to an mp4 (H.264, yuv420p, BT.709) that appears at `path` whole or not at all.

    Args:
        frames: chunks of any number of whole RGB frames, uint8, height x width x 3. Encoding of a chunk overlaps with
            whatever the iterable does to make the next one.
        path: where the file goes; one that exists is replaced. The folder must exist.
        height, width: pixels, even.
        fps: frames per second.
        crf: constant rate factor, 1 (best) to 51.
        comment: stored in the file, printable ASCII.
        on_start: is given a function that ends ffmpeg at once, from any thread and at any time; encode_failed follows.

    Raises:
        ConfigError: no ffmpeg, or one without libx264.
        GenerationError: ffmpeg failed; code encode_failed.
        Exception: whatever the iterable raises; nothing is left on disk then.
    """
    # Absolute: ffmpeg would take "-x/out.mp4" for an option and "a:b.mp4" for a protocol.
    path = Path(path).absolute()
    program = find_ffmpeg()
    with atomic_file(path) as temporary:
        command = _command(program, temporary, height=height, width=width, fps=fps, crf=crf, comment=comment)
        try:
            _encode(command, frames, on_start)
        except GenerationError as error:
            if "encoder" in str(error).lower():
                check_encoder(program)
            raise


def _encode(
    command: list[str | Path],
    frames: Iterable[bytes | memoryview],
    on_start: Callable[[Callable[[], None]], None] | None,
) -> None:
    with tempfile.TemporaryFile() as log:
        # A session of its own: Ctrl-C in a terminal goes to us, and we decide what becomes of the file.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
        assert process.stdin is not None
        try:
            if on_start is not None:
                on_start(process.kill)
            for chunk in frames:
                if not _is_fed(process.stdin, chunk):
                    break
        except BaseException:
            process.kill()
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            said = log.read().decode(errors="replace")
            raise GenerationError(f"ffmpeg failed: {cause_of(said) or process.returncode}", "encode_failed")


def _is_fed(stdin: IO[bytes], chunk: bytes | memoryview) -> bool:
    """Whether ffmpeg took the chunk. Where it gave up, its exit status and its log say why."""
    try:
        stdin.write(chunk)
        stdin.flush()
    except BrokenPipeError:
        return False
    return True


def _command(
    program: str, target: Path, *, height: int, width: int, fps: int, crf: int, comment: str
) -> list[str | Path]:
    options = {
        "-vf": "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact,"
        "setparams=color_primaries=bt709:color_trc=bt709",
        "-c:v": "libx264",
        "-preset": "medium",
        "-crf": str(crf),
        "-threads": str(NUM_ENCODER_THREADS),
        "-pix_fmt": "yuv420p",
        "-colorspace": "bt709",
        "-color_range": "tv",
        "-flags:v": "+bitexact",
        "-fflags": "+bitexact",
        "-map_metadata": "-1",
        "-metadata": f"comment={comment}",
        "-movflags": "+faststart",
        "-f": "mp4",
    }
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    chosen = [word for pair in options.items() for word in pair]
    return [program, "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *source, *chosen, target]
