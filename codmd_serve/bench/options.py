"""Settings of `codmd-serve bench`; imports nothing heavy."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from codmd_serve.config import default_bundle_path
from codmd_serve.errors import ConfigError

PRESETS = ("wan-1.3b", "wan-14b", "tiny")
OPPONENTS = ("diffusers", "lossy", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """One row of the results. The command line is made from these fields.

    Attributes:
        bundle: folder of the student bundle; not read with random_weights.
        random_weights: a preset to make a bundle of, or empty.
        against: `diffusers` (eager, as many forward passes; and its 50-step teacher), `lossy` (the engine with
            fp8, with SageAttention and with both, and how far each is off) or `none`.
        device, dtype: as for serving.
        height, width: pixels; 0 is what the bundle was trained at.
        num_frames: 4k + 1; 0 is what the bundle was trained at.
        pairs: timed requests of each side at equal steps, taken in turns.
        teacher_pairs: the same against the teacher; 0 leaves it out.
        limit_s: no new measurement is begun after this many seconds; the one in progress ends.
        cold_start: whether a server is started to time it up to /ready, or, with `serving`, to ask it for videos.
        serving: measure server and overlap of this row in place of its stages.
        timeline: PNG of three overlapped requests, in `out`; written with `serving`.
        resume: whether a row that the folder has from this version on this device is kept as it is.
        out: folder of the results; made when missing.
        work: folder that keeps random weights between calls; a temporary one when empty.

    Raises:
        ConfigError: a value out of its range, a preset or opponent that does not exist.
    """

    bundle: str = field(default_factory=lambda: str(default_bundle_path()))
    random_weights: str = ""
    against: str = "diffusers"
    device: str = "auto"
    dtype: str = "auto"
    height: int = 0
    width: int = 0
    num_frames: int = 0
    pairs: int = 15
    teacher_pairs: int = 2
    limit_s: int = 420
    cold_start: bool = True
    serving: bool = False
    timeline: str = "timeline.png"
    resume: bool = False
    out: str = "runs/bench"
    work: str = ""

    def __post_init__(self) -> None:
        if self.random_weights and self.random_weights not in PRESETS:
            raise ConfigError(f"random_weights must be one of {', '.join(PRESETS)}, got {self.random_weights!r}")
        if self.against not in OPPONENTS:
            raise ConfigError(f"against must be one of {', '.join(OPPONENTS)}, got {self.against!r}")
        if Path(self.timeline).name != self.timeline or not self.timeline.endswith(".png"):
            raise ConfigError(f"timeline must be the name of a .png file, got {self.timeline!r}; --out is its folder")
        ranges = {
            "height": (0, 2**20),
            "width": (0, 2**20),
            "num_frames": (0, 2**20),
            "pairs": (1, 100),
            "teacher_pairs": (0, 100),
            "limit_s": (1, 86_400),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be in {low}..{high}, got {getattr(self, name)}")


def writable_folder(name: str) -> Path:
    """Create the folder and check that it can be written, before minutes are spent on measuring.

    Raises:
        ConfigError: it cannot be made, is a file, or cannot be written to.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}; choose another with --out") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"the folder {folder} cannot be written to; choose another with --out")
    return folder
