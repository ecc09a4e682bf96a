"""Fixtures of the serving tests: reading videos back, the worker process with a fake engine."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from codmd_serve import pool as pool_module
from codmd_serve.video import find_ffmpeg

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


class Video(NamedTuple):
    """A decoded video: (T, H, W, 3) uint8, frames per second, what ffmpeg calls its stream."""

    frames: npt.NDArray[np.uint8]
    fps: float
    stream: str


ReadVideo = Callable[[Path | bytes], Video]


def _read_video(source: Path | bytes) -> Video:
    data = source if isinstance(source, bytes) else source.read_bytes()
    # A pipe: the index of these files is at their front, so they can be played while they arrive.
    command = [find_ffmpeg(), "-hide_banner", "-i", "pipe:0", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    stream = next(line for line in done.stderr.decode().splitlines() if "Video: h264" in line)
    size = re.search(r"(\d+)x(\d+)", stream.split("yuv", 1)[1])
    fps = re.search(r"([\d.]+) fps", stream)
    assert size is not None and fps is not None
    shape = (-1, int(size[2]), int(size[1]), 3)
    return Video(np.frombuffer(done.stdout, np.uint8).reshape(shape), float(fps[1]), stream)


@pytest.fixture(scope="session")
def read_video() -> ReadVideo:
    """Decode an mp4, given as a path or as its bytes."""
    return _read_video


@pytest.fixture(scope="session")
def fake_worker() -> tuple[str, ...]:
    """Command that starts a worker process with a fake engine, whose prompts are orders (see fake_worker.py)."""
    return (sys.executable, str(FAKE_WORKER))


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker that died be replaced at once."""
    monkeypatch.setattr(pool_module, "MAX_BACKOFF_S", 0.01)
