"""Verifies the videos of a plan before hours of scoring: there, decodable, of one shape and rate, none twice.

Every planned video gets a verdict, so none can leave the denominator unseen.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

from codmd_serve.errors import ConfigError
from codmd_serve.files import TEMPORARY_PREFIX
from codmd_serve.video import cause_of, find_ffmpeg
from distill.evaluate.vbench.generate import VIDEOS_NAME, failures, read_generation
from distill.evaluate.vbench.manifest import Plan, refuse_case_collisions

PROBE_TIMEOUT_S = 300.0
NUM_PROBES = 4
LISTED = 20


@dataclass(frozen=True, slots=True)
class Probe:
    """What is in a video file.

    Attributes:
        width, height, num_frames: as decoded.
        fps: by its timestamps; 0 for a single frame.
        content: digest of the pixels.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    content: str


@dataclass(kw_only=True, slots=True)
class Verdicts:
    """Every planned video, under what is the matter with it.

    Attributes:
        good: with nothing.
        missing: never made.
        failed: not made, with the reason the engine gave.
        damaged: there, but not decodable or not of the shape, with the reason.
        twins: pairs with the same pixels, from different seeds.
        strangers: files that no plan names.
    """

    good: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    twins: list[tuple[str, str]] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether scoring can begin."""
        return not (self.missing or self.failed or self.damaged or self.twins or self.strangers)

    def lines(self) -> list[str]:
        """Describe the verdicts, one line each kind and the first of its files."""
        num = len(self.good) + len(self.missing) + len(self.failed) + len(self.damaged)
        lines = [f"{len(self.good)} of {num} planned videos are good"]
        kinds: list[tuple[str, list[str]]] = [
            ("missing", self.missing),
            ("failed", [f"{name} ({reason})" for name, reason in self.failed.items()]),
            ("damaged", [f"{name} ({reason})" for name, reason in self.damaged.items()]),
            ("of different seeds with equal pixels", [f"{a} = {b}" for a, b in self.twins]),
            ("not of this plan", self.strangers),
        ]
        return lines + [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds if names]


def listed(names: Sequence[str]) -> str:
    """Return the names, the first 20 of many."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"


def check_videos(folder: Path, plan: Plan, files: Sequence[str] | None = None) -> Verdicts:
    """Look at every planned video of a folder.

    Args:
        folder: with the plan, the ledger and the videos.
        plan: of that folder.
        files: look at these alone; None looks at all, and for files that no plan names.

    Raises:
        ConfigError: no folder of videos, or names that differ only in case.
    """
    videos = folder / VIDEOS_NAME
    if not videos.is_dir():
        raise ConfigError(f"no folder {videos}: `codmd-distill eval vbench generate {folder}` makes it")
    there = sorted(path.name for path in videos.iterdir() if not path.name.startswith(TEMPORARY_PREFIX))
    refuse_case_collisions(there, str(videos))
    planned = [video.file for _, video in plan.videos() if files is None or video.file in files]
    verdicts = Verdicts()
    reasons = failures(folder)
    present = [name for name in planned if name in set(there)]
    for name in planned:
        if name not in present:
            if name in reasons:
                verdicts.failed[name] = reasons[name]
            else:
                verdicts.missing.append(name)
    with ThreadPoolExecutor(NUM_PROBES) as pool:
        probes = list(pool.map(lambda name: probe(videos / name), present))
    _judge(verdicts, dict(zip(present, probes, strict=True)), read_generation(folder))
    if files is None:
        verdicts.strangers = sorted(set(there) - set(planned))
    return verdicts


def probe(path: Path) -> Probe | str:
    """Decode a video file; return what is in it, or why it cannot be decoded."""
    command = [
        find_ffmpeg(),
        "-v",
        "error",
        "-err_detect",
        "explode",
        "-threads",
        "1",
        "-i",
        f"file:{path}",
        "-map",
        "0:v:0",
    ]
    command += ["-fps_mode", "passthrough", "-f", "framemd5", "-"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"ffmpeg did not end within {PROBE_TIMEOUT_S:.0f} s"
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode or said:
        return cause_of(said) or f"ffmpeg ended with {done.returncode}"
    return _parse(done.stdout.decode())


def _parse(text: str) -> Probe | str:
    size = re.search(r"^#dimensions 0: (\d+)x(\d+)$", text, re.M)
    base = re.search(r"^#tb 0: (\d+)/(\d+)$", text, re.M)
    rows = [line.split(",") for line in text.split("\n") if line and not line.startswith("#")]
    if size is None or base is None or not rows:
        return "no frames"
    span = (int(rows[-1][2]) - int(rows[0][2])) * Fraction(int(base[1]), int(base[2]))
    content = sha256("".join(row[5].strip() for row in rows).encode()).hexdigest()
    fps = float((len(rows) - 1) / span) if span else 0.0
    return Probe(int(size[1]), int(size[2]), len(rows), fps, content)


def _judge(verdicts: Verdicts, probes: dict[str, Probe | str], generation: dict[str, object]) -> None:
    seen = next((found for found in probes.values() if isinstance(found, Probe)), None)
    if seen is None:
        verdicts.damaged.update({name: str(found) for name, found in probes.items()})
        return
    # Without a record the first video is what the others must be like.
    wanted = {name: generation.get(name, getattr(seen, name)) for name in ("width", "height", "num_frames", "fps")}
    contents: dict[str, str] = {}
    for name, found in probes.items():
        problem = found if isinstance(found, str) else _misfit(found, wanted)
        if problem or isinstance(found, str):
            verdicts.damaged[name] = problem or ""
            continue
        verdicts.good.append(name)
        first = contents.setdefault(found.content, name)
        if first != name:
            verdicts.twins.append((first, name))


def _misfit(found: Probe, wanted: dict[str, object]) -> str:
    for name in ("width", "height", "num_frames"):
        if getattr(found, name) != wanted[name]:
            return f"{name} {getattr(found, name)}, expected {wanted[name]}"
    fps = float(str(wanted["fps"]))
    # Time bases round, but 29.97 is not 30.
    return "" if abs(found.fps - fps) <= 2e-4 * fps else f"fps {found.fps:.3f}, expected {fps:g}"
