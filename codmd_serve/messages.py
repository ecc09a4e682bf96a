"""What a worker process and the pool that owns it say to each other: frozen dataclasses, one JSON object per line.

To the worker: `Load` once, then `Generate` and `Cancel`. From the worker: `Ready` or `Fatal` once; then, for each job,
`Started`, any number of `Progress`, and exactly one of `Done`, `Failed`, `Cancelled`. A job that is cancelled while it
waits in the worker is never started. `Alive` comes in between, whatever the worker does: a silent worker hangs.

Standard library only, so that both sides import it at once.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from codmd_serve.config import GenerateParams, ModelFacts

MAX_MESSAGE_BYTES = 2**20
HEARTBEAT_S = 1.0
# Code of a Failed after which the worker ends: every call to its device would fail.
DEVICE_ERROR = "device_error"


@dataclass(frozen=True, slots=True)
class Load:
    """Load an engine.

    Attributes:
        bundle: folder of the student bundle.
        settings: keyword arguments of `load_engine`, named in config.ENGINE_SETTINGS.
    """

    bundle: str
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Generate:
    """Make one video, after those that were sent before it.

    Attributes:
        id: of the job.
        path: where the file goes; the worker makes the folder when it is missing.
        params: what to make.
        is_previewed: whether each `Progress` of a denoising step carries a preview.
    """

    id: str
    path: str
    params: GenerateParams
    is_previewed: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give a job up within one denoising step or one decoded chunk. Ignored for a job that has ended."""

    id: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is warm."""

    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class Fatal:
    """The engine cannot be loaded; the worker ends."""

    message: str


@dataclass(frozen=True, slots=True)
class Alive:
    """Heartbeat of the worker."""


@dataclass(frozen=True, slots=True)
class Started:
    """The device begins with the job."""

    id: str


@dataclass(frozen=True, slots=True)
class Progress:
    """A part of a stage is done.

    Attributes:
        id: of the job.
        stage: text, denoise, decode or encode.
        done, total: text 1 of 1; denoise steps; decode and encode frames.
        preview: data URL of an animated WebP of the predicted clean video; only with stage denoise, when asked for.
    """

    id: str
    stage: str
    done: int
    total: int
    preview: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """The video is at its path.

    Attributes:
        id: of the job.
        timings_ms: milliseconds by stage.
        warnings: one sentence each, about what the model could not take as asked.
        peak_memory_mb: peak memory of the job: allocated on the device, or resident in the worker on a CPU.
    """

    id: str
    timings_ms: dict[str, float]
    warnings: list[str]
    peak_memory_mb: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """The job failed; nothing is at its path.

    Attributes:
        id: of the job.
        code: stable machine-readable word, for example out_of_memory.
        message: one sentence for the client; it names no path of the server.
    """

    id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The job was given up; nothing is at its path."""

    id: str


ToWorker = Load | Generate | Cancel
JobMessage = Started | Progress | Done | Failed | Cancelled
FromWorker = Ready | Fatal | Alive | JobMessage
Message = ToWorker | FromWorker

_KINDS: dict[str, Any] = {
    kind.__name__.lower(): kind
    for kind in (Load, Generate, Cancel, Ready, Fatal, Alive, Started, Progress, Done, Failed, Cancelled)
}
_NESTED: dict[str, Any] = {"params": GenerateParams, "facts": ModelFacts}


def encode(message: Message) -> bytes:
    """One line with its line end."""
    return json.dumps({"type": type(message).__name__.lower(), **asdict(message)}).encode() + b"\n"


def decode(line: bytes | str) -> Message:
    """The inverse of `encode`.

    Raises:
        ValueError: the line is no message: not JSON, of unknown type, or with other fields than the type has.
    """
    try:
        fields = json.loads(line)
        kind = _KINDS[fields.pop("type")]
        nested = {name: of(**fields[name]) for name, of in _NESTED.items() if name in fields}
        message: Message = kind(**{**fields, **nested})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a message: {line[:80]!r}") from error
    return message
