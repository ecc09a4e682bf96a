"""Videos of a study through ffmpeg: what a file holds, and copies that tell nothing of where they came from.

All copies have one codec, one quality and no metadata, and the two of a trial have the same number of bytes.
Knows nothing of arms or raters.
"""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from codmd_serve.errors import GenerationError
from codmd_serve.video import cause_of, check_encoder, find_ffmpeg

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
# Only containers, from this disk: a playlist could name files and hosts.
_INPUT = ["-protocol_whitelist", "file", "-format_whitelist", "mov,matroska,webm,avi,gif"]
_QUIET = ["-hide_banner", "-loglevel", "error", "-nostdin", "-y"]
TIMEOUT_S = 600.0
# Copies are of copies: a rate factor far below what anybody sees.
CRF = 10
# Noise at that rate would make the broken video many times as large as all others.
BROKEN_CRF = 34
# The header of an mp4 box; a box called free is skipped by every player.
_BOX_HEADER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Clip:
    """What a video file holds.

    Attributes:
        width, height: pixels.
        num_frames: frames of the first video stream.
        fps: frames per second, the mean over the video.
        digest: SHA-256 of the decoded pictures; equal for equal pictures in different files.
    """

    width: int
    height: int
    num_frames: int
    fps: Fraction
    digest: str

    @property
    def duration_s(self) -> float:
        """Seconds from the first picture to the end of the last."""
        return float(self.num_frames / self.fps)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.num_frames} frames at {float(self.fps):g} fps"


class UnplayableError(Exception):
    """A file that is no video, or ends early, or is damaged; the message is the cause in ffmpeg's words."""


def inspect_clip(path: Path) -> Clip:
    """Decode a whole video.

    Raises:
        UnplayableError: it cannot be played from beginning to end, or has fewer than two pictures.
    """
    if path.stat().st_size == 0:
        raise UnplayableError("the file is empty")
    command = [find_ffmpeg(), *_QUIET, "-xerror", "-err_detect", "explode", *_INPUT, "-i", f"file:{path.absolute()}"]
    command += ["-map", "0:v:0", "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "framehash", "-"]
    done = _run(command)
    if done.returncode:
        raise UnplayableError(cause_of(done.stderr.decode(errors="replace")) or "it cannot be decoded")
    return _parse_frame_hashes(done.stdout.decode())


def _parse_frame_hashes(text: str) -> Clip:
    header, digest, durations = {}, hashlib.sha256(), []
    for line in text.split("\n"):
        if line.startswith("#"):
            name, _, value = line[1:].partition(":")
            header[name.strip()] = value.strip()
        elif line.strip():
            fields = [field.strip() for field in line.split(",")]
            durations.append(int(fields[3]))
            digest.update(fields[5].encode())
    if len(durations) < 2:
        raise UnplayableError(f"it has {len(durations)} picture{'s' * (len(durations) != 1)}, a video has two or more")
    width, _, height = header["dimensions 0"].partition("x")
    duration_s = sum(durations) * Fraction(header["tb 0"])
    if duration_s <= 0:
        raise UnplayableError("it does not say how long its pictures stand")
    fps = (len(durations) / duration_s).limit_denominator(1001)
    return Clip(int(width), int(height), len(durations), fps, digest.hexdigest())


def copy_clip(source: Path, clip: Clip, target: Path) -> None:
    """Encode a video anew, without metadata and sound.

    Raises:
        GenerationError: ffmpeg failed.
    """
    _encode(source, clip, target, [], CRF)


def break_clip(source: Path, clip: Clip, target: Path) -> None:
    """Encode a video so broken that everybody sees it: coarse blocks, noise, and the frames in random order.

    Raises:
        GenerationError: ffmpeg failed.
    """
    blocks = f"scale={max(clip.width // 12, 2)}:{max(clip.height // 12, 2)}:flags=area"
    back = f"scale={clip.width}:{clip.height}:flags=neighbor"
    shuffle = f"random=frames={min(clip.num_frames, 512)}:seed=1"
    _encode(source, clip, target, [blocks, back, "noise=alls=40:allf=t:all_seed=1", shuffle], BROKEN_CRF)


def _encode(source: Path, clip: Clip, target: Path, filters: list[str], crf: int) -> None:
    program = find_ffmpeg()
    check_encoder(program)
    # Even sides, as yuv420p needs; colours and times in one form, whatever form the source has them in.
    filters = [
        *filters,
        "pad=ceil(iw/2)*2:ceil(ih/2)*2",
        f"setpts=N/({clip.fps}*TB)",
        "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact",
        "setparams=color_primaries=bt709:color_trc=bt709",
        "setsar=1",
    ]
    options = ["-an", "-sn", "-dn", "-vf", ",".join(filters), "-r", str(clip.fps), "-frames:v", str(clip.num_frames)]
    options += ["-c:v", "libx264", "-preset", "faster", "-crf", str(crf), "-pix_fmt", "yuv420p", "-threads", "2"]
    options += ["-colorspace", "bt709", "-color_range", "tv", "-video_track_timescale", "90000"]
    options += ["-map_metadata", "-1", "-map_chapters", "-1", "-flags:v", "+bitexact", "-fflags", "+bitexact"]
    command = [program, *_QUIET, *_INPUT, "-i", f"file:{source.absolute()}", "-map", "0:v:0", *options]
    done = _run([*command, "-movflags", "+faststart", "-f", "mp4", f"file:{target.absolute()}"])
    if done.returncode:
        raise GenerationError(f"{source} cannot be copied: {cause_of(done.stderr.decode(errors='replace'))}")


def equalise_sizes(paths: list[Path]) -> None:
    """Pad mp4 files to one number of bytes, with a box that players skip."""
    sizes = {path: path.stat().st_size for path in paths}
    # So that the largest one gets a box as well.
    total = max(sizes.values()) + _BOX_HEADER_BYTES
    for path, size in sizes.items():
        padding = total - size
        with path.open("ab") as file:
            file.write(padding.to_bytes(4, "big") + b"free" + bytes(padding - _BOX_HEADER_BYTES))


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, b"", f"it takes more than {TIMEOUT_S:.0f} s".encode())
