"""What a suite of validation is: it names its samples and scores them; knows neither networks nor the training loop.

Legend: K samples, C channels, F latent frames, H and W rows and columns, T pixel frames.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

LATENTS, CLIPS, VIDEOS = "latents", "clips", "videos"


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to draw: a prompt, and which of its samples it is."""

    prompt: str
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Samples:
    """What the student made of the requests, in their order.

    Attributes:
        latents: (K, C, F, H, W) float32 on the CPU; None where the suite needs clips or videos.
        clips: uint8 (K, T, H, W, 3); None where it does not need them.
        videos: folder of 00000.mp4 and so on, and prompts.json; None where it does not need them.
        is_stopping: whether a signal has come that ends the run; a score that takes long asks it now and then.
    """

    latents: Tensor | None = None
    clips: np.ndarray | None = None
    videos: Path | None = None
    is_stopping: Callable[[], bool] = lambda: False


class Suite(Protocol):
    """A set of samples and their scores."""

    @property
    def needs(self) -> str:
        """LATENTS, CLIPS or VIDEOS."""

    @property
    def requests(self) -> Sequence[Request]:
        """The samples, the same at each validation."""

    @property
    def better(self) -> Mapping[str, str]:
        """For each value that can choose the best student, whether `high` or `low` is better."""

    def score(self, samples: Samples) -> dict[str, float]:
        """Return all values by name; rank 0 alone calls it. Whatever it raises is reported, and the run goes on."""
