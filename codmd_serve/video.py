"""uint8 frames to an H.264 mp4, streamed through ffmpeg; knows nothing of tensors or models.

The same frames and settings give the same bytes with the same ffmpeg: no dates, no random identifiers, and a thread
count of our own, because what x264 decides depends on it.
"""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import imageio_ffmpeg

from codmd_serve.errors import ConfigError, GenerationError
from codmd_serve.files import atomic_file

NUM_ENCODER_THREADS = 4


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
        ConfigError: no ffmpeg.
        GenerationError: ffmpeg failed; code encode_failed.
        Exception: whatever the iterable raises; nothing is left on disk then.
    """
    # Absolute: ffmpeg would take "-x/out.mp4" for an option and "a:b.mp4" for a protocol.
    path = Path(path).absolute()
    program = find_ffmpeg()
    with atomic_file(path) as temporary:
        command = _command(program, temporary, height=height, width=width, fps=fps, crf=crf, comment=comment)
        _encode(command, frames, on_start)


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
            said = log.read().decode(errors="replace").strip().splitlines()
            raise GenerationError(f"ffmpeg failed: {said[-1] if said else process.returncode}", "encode_failed")


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
