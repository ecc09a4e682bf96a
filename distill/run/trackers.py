"""Where the numbers of a run are shown while it goes: TensorBoard, Weights & Biases, Trackio; knows no network.

Rank 0 alone has trackers. One that fails is left out from then on, with one line in the log, and the run goes on;
log.jsonl has everything either way. Nothing is imported before a tracker is asked for.

RUN/tensorboard/                   the numbers of log.jsonl and validation.jsonl, and the previews
RUN/wandb/                         the same for `--track wandb`
"""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line
from distill.config import DistillConfig, config_to_dict

PROJECT = "codmd"
ITERATION = "iteration"

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One place that shows a run. It may raise anything; see `Trackers`."""

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Show numbers of an iteration."""

    def show(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Show a picture, uint8 (rows, columns, 3)."""

    def close(self) -> None:
        """Write what is not yet written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a tracker is told of a run.

    Attributes:
        iteration: already done; what a tracker holds of later ones is to be replaced where it can be.
    """

    out: Path
    config: DistillConfig
    iteration: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.out.resolve().name

    @property
    def identity(self) -> str:
        """The same for all sittings of a run, and for no other run."""
        return hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:16]


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Run) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self.writer: Any = module.SummaryWriter(str(run.out / "tensorboard"), purge_step=run.iteration)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)

    def show(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Write an image."""
        self.writer.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the file."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in RUN/wandb."""

    def __init__(self, run: Run) -> None:
        self.wandb: Any = importlib.import_module("wandb")
        self.run: Any = self.wandb.init(
            project=PROJECT,
            name=run.name,
            id=run.identity,
            resume="allow",
            dir=str(run.out),
            config=config_to_dict(run.config),
        )
        # Its own step may not go back, which a resumed run does.
        self.run.define_metric("*", step_metric=ITERATION)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Log numbers beside their iteration."""
        self.run.log({**values, ITERATION: iteration})

    def show(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Log a picture."""
        self.run.log({name: self.wandb.Image(picture), ITERATION: iteration})

    def close(self) -> None:
        """Finish the run, which waits for its upload."""
        self.run.finish()


class Trackio:
    """A run of Trackio, kept on this machine; `trackio show` opens it."""

    def __init__(self, run: Run) -> None:
        self.trackio: Any = importlib.import_module("trackio")
        with contextlib.redirect_stdout(io.StringIO()):  # hints on how to open it
            self.run: Any = self.trackio.init(
                project=PROJECT,
                name=f"{run.name}-{run.identity[:6]}",
                config=config_to_dict(run.config),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Log numbers of a step."""
        self.run.log(dict(values), step=iteration)

    def show(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Log a picture."""
        self.run.log({name: self.trackio.Image(picture)}, step=iteration)

    def close(self) -> None:
        """Write what is in flight."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()


# By the name of `--track`: what makes it, and the package that has to be there.
TRACKERS: dict[str, tuple[Callable[[Run], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "trackio": (Trackio, "trackio"),
    "wandb": (Wandb, "wandb"),
}
DEFAULT = ("tensorboard",)
NONE = "none"


def check_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """Return the trackers to use, each once; `none` alone is no tracker.

    Raises:
        ConfigError: an unknown name, or a package that is not installed; the message has the command that installs it.
    """
    if list(names) == [NONE]:
        return ()
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--track must be {NONE} or some of {', '.join(TRACKERS)}, got {name!r}")
        package = TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--track {name} needs the package {package}: pip install {package}")
    return tuple(dict.fromkeys(names))


class Trackers:
    """All trackers of a run; none of them can end it.

    Args:
        names: of `check_trackers`.
        run: what they are told of it.
    """

    def __init__(self, names: Sequence[str], run: Run) -> None:
        self.open: dict[str, Tracker] = {}
        for name in names:
            make = TRACKERS[name][0]
            self._try(name, lambda name=name, make=make: self.open.update({name: make(run)}))  # type: ignore[misc]

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Show numbers of an iteration."""
        for name, tracker in list(self.open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, iteration))  # type: ignore[misc]

    def show(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Show a picture, uint8 (rows, columns, 3)."""
        for own, tracker in list(self.open.items()):
            self._try(own, lambda tracker=tracker: tracker.show(name, picture, iteration))  # type: ignore[misc]

    def close(self) -> None:
        """Close all of them."""
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.close)
        self.open.clear()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # each library, its network and its disk raise their own kinds
            self.open.pop(name, None)
            logger.warning("tracker left out name=%s reason=%s", name, first_line(error))
