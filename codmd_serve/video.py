"""uint8 frames to an H.264 mp4, a gif or an animated WebP, streamed through ffmpeg; knows nothing of tensors or models.

The same frames and settings give the same bytes with the same ffmpeg: no dates, no random identifiers, and a thread
count of our own, because what x264 decides depends on it.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import imageio_ffmpeg

from codmd_serve.errors import ConfigError, GenerationError
from codmd_serve.files import atomic_file, first_line
from codmd_serve.service_time import LOOKAHEAD_FRAMES, encoder_limit_s

# Pixels of a picture up to which one thread ends sooner than four, which wait for each other and hold back more frames:
# on two cores the last 12 of 25 frames of 96 x 96 take 28 ms instead of 53, the last 16 of 192 x 320 61 instead of 72,
# and those of 480 x 832 315 instead of 240. The bytes are the same, or as many.
MAX_ONE_THREAD_PX = 65_536
NUM_ENCODER_THREADS = 4
# At equal SSIM 12 % more bytes than medium for 30 % less processor time; and x264 holds back 10 frames instead of 40,
# which is what is left to do when the last frame has come. veryfast takes half the time, but 22 % more bytes.
PRESET = "faster"
NUM_LOOKAHEAD_FRAMES = 10
CHECK_TIMEOUT_S = 10.0
FORMAT_OF_SUFFIX = {"": "mp4", ".mp4": "mp4", ".m4v": "mp4", ".gif": "gif", ".webp": "webp"}
# ffmpeg ends its status lines by a return. Not splitlines: a path may hold U+2028.
_LINE_END = re.compile(r"[\r\n]")
_FAILURE = re.compile(
    r"error|fail|unknown|unrecogni|invalid|denied|cannot|could not|unable|no such|no space|not ", re.I
)
_NOTICE = re.compile(r"deprecated|^warning|^last message repeated|^conversion failed", re.I)
# One palette for all frames, of every n-th pixel of large ones: counting colours is most of the work. Where nothing
# moves nothing is dithered anew, so it does not flicker.
GIF_FILTERS = (
    "split[a][b];[a]scale=w=min(iw\\,416):h=-1:flags=neighbor,palettegen[p];"
    "[b][p]paletteuse=dither=sierra2_4a:diff_mode=rectangle"
)
POLL_S = 0.2
FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE_ERRNOS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EIO)
MAX_LOG_BYTES = 2**16

logger = logging.getLogger(__name__)


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
    done = _list_encoders(program)
    if re.search(rb"(?m)^ V\S* +libx264 ", done.stdout) is None:
        said = cause_of(done.stderr.decode(errors="replace"))
        reason = f": {said}" if said else ""
        raise ConfigError(
            f"this ffmpeg has no libx264{reason} ({program}): unset IMAGEIO_FFMPEG_EXE to use the one that comes with "
            "imageio-ffmpeg, or let it name an ffmpeg that was built with --enable-libx264"
        )


@functools.cache
def has_webp_encoder(program: str) -> bool:
    """Whether an ffmpeg writes animated WebP; not when it cannot be run."""
    try:
        return re.search(rb"(?m)^ V\S* +libwebp_anim ", _list_encoders(program).stdout) is not None
    except ConfigError:
        return False


def _list_encoders(program: str) -> "subprocess.CompletedProcess[bytes]":
    command = [program, "-hide_banner", "-loglevel", "error", "-encoders"]
    try:
        return subprocess.run(command, capture_output=True, timeout=CHECK_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"ffmpeg {program} cannot be run: {first_line(error)}") from None


def cause_of(said: str) -> str:
    """Return the line of a program's error output that names the cause: the first that tells of a failure.

    ffmpeg says what is wrong first and then what it gave up for that reason, up to a bare "Conversion failed!".
    """
    lines = [re.sub(r"^\[[^\]]* @ 0x[0-9a-f]+\] *", "", line.strip()) for line in _LINE_END.split(said) if line.strip()]
    telling = [line for line in lines if _FAILURE.search(line) and not _NOTICE.search(line)]
    return (telling or lines or [""])[0]


def format_of(path: Path) -> str:
    """The format that the suffix of a name promises; mp4 without a suffix.

    Raises:
        ConfigError: a suffix of no format that is written.
    """
    try:
        return FORMAT_OF_SUFFIX[path.suffix.lower()]
    except KeyError:
        raise ConfigError(
            f"{path.name} has the suffix {path.suffix}: only mp4, gif and webp are written; name it "
            f"{path.with_suffix('.mp4').name}, and turn it into another format with ffmpeg"
        ) from None


def write_video(
    frames: Iterable[bytes | memoryview],
    path: Path,
    *,
    height: int,
    width: int,
    fps: int,
    crf: int,
    comment: str = "",
    format: str = "mp4",
    on_start: Callable[[Callable[[], None]], None] | None = None,
    on_wait: Callable[[], None] | None = None,
) -> None:
    """Encode frames to a file that appears at `path` whole or not at all.

    ffmpeg dies with this process, and is killed when it makes no progress.

    Args:
        frames: chunks of any number of whole RGB frames, uint8, height x width x 3. Encoding of a chunk overlaps with
            whatever the iterable does to make the next one.
        path: where the file goes; one that exists is replaced. A missing folder is made.
        height, width: pixels, even.
        fps: frames per second.
        crf: constant rate factor, 1 (best) to 51. WebP takes a quality of 118 - 2 crf, a gif takes none.
        comment: stored in an mp4, printable ASCII.
        format: mp4 (H.264, yuv420p, BT.709), gif (one palette of 256 colours) or webp (lossy). The two play for ever.
        on_start: is given a function that ends ffmpeg at once, from any thread and at any time; encode_failed follows.
        on_wait: called several times a second after the last frame, and once when the file is about to appear; what it
            raises ends ffmpeg.

    Raises:
        GenerationError: code encoder_missing, encode_failed, encoder_hung (no progress), storage_full or
            storage_unwritable. The message names no path.
        Exception: whatever the iterable or on_wait raises; nothing is left on disk then.
    """
    # Absolute: ffmpeg would take "-x/out.mp4" for an option and "a:b.mp4" for a protocol.
    path = Path(path).absolute()
    program = _working_ffmpeg()
    with _storage_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
    with _storage_errors(), atomic_file(path) as partial:
        command = _command(
            program, partial, height=height, width=width, fps=fps, crf=crf, comment=comment, format=format
        )
        encoder = _Encoder(command, format, height * width * LOOKAHEAD_FRAMES if format == "mp4" else math.inf)
        try:
            if on_start is not None:
                on_start(encoder.kill)
            for chunk in frames:
                if not encoder.feed(chunk):
                    break
            encoder.finish(on_wait)
        except BaseException:
            encoder.kill()
            raise
        finally:
            encoder.close()
        encoder.check(partial)
        if on_wait is not None:
            on_wait()


def _working_ffmpeg() -> str:
    try:
        return find_ffmpeg()
    except ConfigError as error:
        logger.error("code=encoder_missing %s", error)
        raise GenerationError("the server has no working ffmpeg; its log says more", "encoder_missing") from error


class _Encoder:
    """A running ffmpeg.

    Args:
        command: of ffmpeg, which reads frames from its input.
        format: mp4, gif or webp.
        max_px_left: pixels that it may hold back until its input ends; infinite where that is all of them.

    Raises:
        GenerationError: code encoder_missing.
    """

    def __init__(self, command: list[str | Path], format: str, max_px_left: float) -> None:
        self._format = format
        self._max_px_left = max_px_left
        self._num_bytes = 0
        self._is_hung = False
        self._log = b""
        try:
            # A process group of its own: Ctrl-C in a terminal goes to us, and we decide what becomes of the file.
            self._process = subprocess.Popen(
                [*_dying_with_parent(), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                process_group=0,
            )
        except OSError as error:
            logger.error("code=encoder_missing %s", error)
            raise GenerationError("the server's ffmpeg cannot be run; its log says more", "encoder_missing") from error
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)

    def feed(self, chunk: bytes | memoryview) -> bool:
        """Give it frames; False when it gave up. Its exit status and its log say why."""
        stdin = self._process.stdin
        assert stdin is not None
        self._num_bytes += len(chunk)
        timer = threading.Timer(self._limit_s(len(chunk)), self._kill_hung)
        timer.daemon = True
        timer.start()
        try:
            stdin.write(chunk)
            stdin.flush()
        except BrokenPipeError:
            return False
        finally:
            timer.cancel()
        return True

    def finish(self, on_wait: Callable[[], None] | None) -> None:
        """Wait until it has encoded everything."""
        assert self._process.stdin is not None and self._process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        end_s = time.monotonic() + self._limit_s(min(self._num_bytes, 3 * self._max_px_left))
        while self._process.poll() is None:
            # Its end closes the log, so nothing is waited for in vain; one that left children is polled.
            if select.select([self._process.stderr], [], [], POLL_S)[0] and not self._read_log():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(POLL_S)
            if on_wait is not None:
                on_wait()
            if time.monotonic() > end_s:
                self._kill_hung()

    def check(self, partial: Path) -> None:
        """Raise the reason when it failed.

        Raises:
            GenerationError: see `write_video`.
        """
        if self._is_hung:
            raise GenerationError("ffmpeg made no progress and was killed", "encoder_hung")
        status = self._process.returncode
        if status == 0:
            return
        said = self._log.decode(errors="replace")
        cause = cause_of(said) or str(status)
        logger.error("ffmpeg status=%s said=%r", status, cause)
        # ffmpeg ends with the negated error number where it has one.
        if status == 256 - errno.ENOSPC or os.strerror(errno.ENOSPC) in said:
            raise _storage_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        if any(os.strerror(code) in said for code in (errno.EROFS, errno.EACCES, errno.ENOENT)):
            raise GenerationError("the server cannot write videos; its log says more", "storage_unwritable")
        if "libx264" in cause and "encoder" in cause:
            raise GenerationError("the server's ffmpeg has no libx264", "encoder_missing")
        raise GenerationError(f"ffmpeg failed: {cause.replace(str(partial), partial.name)}", "encode_failed")

    def kill(self) -> None:
        """Kill it, and what it started; from any thread and at any time."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Collect it and close its pipes."""
        assert self._process.stdin is not None and self._process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        while self._read_log():
            pass
        self._process.stderr.close()

    def _read_log(self) -> bytes:
        """What it said since the last call; empty when there is nothing, or nothing any more."""
        assert self._process.stderr is not None
        said = self._process.stderr.read(MAX_LOG_BYTES) or b""
        self._log = (self._log + said)[-MAX_LOG_BYTES:]
        return said

    def _limit_s(self, num_bytes: float) -> float:
        return encoder_limit_s(num_bytes / 3, self._format)

    def _kill_hung(self) -> None:
        self._is_hung = True
        self.kill()


@functools.cache
def _dying_with_parent() -> tuple[str, ...]:
    """Words before a command that let the kernel kill it when the thread that started it ends, where there is a way.

    Not preexec_fn: that runs Python between fork and exec, in a process with threads.
    """
    program = shutil.which("setpriv")
    if program is None:
        return ()
    prefix = (program, "--pdeathsig", "KILL", "--")
    # Small systems have one without this option.
    is_known = subprocess.run([*prefix, program, "--version"], capture_output=True, check=False).returncode == 0
    return prefix if is_known else ()


def _storage_error(error: OSError) -> GenerationError:
    if error.errno in FULL_ERRNOS:
        return GenerationError("the server's disk is full", "storage_full")
    return GenerationError(f"the server cannot write videos: {os.strerror(error.errno or 0)}", "storage_unwritable")


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Turn what the file system raises into an error of the request that names no path."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL_ERRNOS, *UNWRITABLE_ERRNOS):  # of whoever makes the frames
            raise
        logger.error("%s", error)
        raise _storage_error(error) from error


def _command(
    program: str, target: Path, *, height: int, width: int, fps: int, crf: int, comment: str, format: str
) -> list[str | Path]:
    webp_quality = min(100, 118 - 2 * crf)
    if format == "webp" and not has_webp_encoder(program):
        numbers = [str(number) for number in (width, height, fps, webp_quality)]
        return [sys.executable, "-m", "codmd_serve.webp", *numbers, target]
    if format == "gif":
        options = {"-filter_complex": GIF_FILTERS, "-loop": "0", "-f": "gif"}
    elif format == "webp":
        options = {"-c:v": "libwebp_anim", "-quality": str(webp_quality), "-loop": "0", "-f": "webp"}
    else:
        options = _h264_options(crf, comment, 1 if height * width <= MAX_ONE_THREAD_PX else NUM_ENCODER_THREADS)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    chosen = [word for pair in options.items() for word in pair]
    return [program, "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *source, *chosen, target]


def _h264_options(crf: int, comment: str, num_threads: int) -> dict[str, str]:
    return {
        "-vf": "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact,"
        "setparams=color_primaries=bt709:color_trc=bt709",
        "-c:v": "libx264",
        "-preset": PRESET,
        "-rc-lookahead": str(NUM_LOOKAHEAD_FRAMES),
        "-crf": str(crf),
        "-threads": str(num_threads),
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
