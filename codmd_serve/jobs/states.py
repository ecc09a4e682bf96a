"""The state machine of a job, and a job as the rest of the server sees it. Knows no SQL.

queued -> running -> completed | failed | cancelled;  completed -> expired
running -> queued when the process or the machine that had it is gone
"""

from dataclasses import dataclass, field

from codmd_serve.config import GenerateParams

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED, EXPIRED = STATUSES = (
    "queued",
    "running",
    "completed",
    "failed",
    "cancelled",
    "expired",
)
# A final status never changes again, but for the video of a completed job, which expires.
FINAL = frozenset({COMPLETED, FAILED, CANCELLED, EXPIRED})
TRANSITIONS = frozenset(
    {
        (QUEUED, RUNNING),
        (QUEUED, CANCELLED),
        (QUEUED, FAILED),
        (RUNNING, COMPLETED),
        (RUNNING, FAILED),
        (RUNNING, CANCELLED),
        (RUNNING, QUEUED),
        (COMPLETED, EXPIRED),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A finished video.

    Attributes:
        id: random; several jobs with the same request share one result.
        name: where it lies, relative to the results place.
        num_bytes: of the file.
        sha256: of the file, hexadecimal.
        media_type: video/mp4, image/gif or image/webp.
        expires_at: Unix time after which the file may be deleted.
    """

    id: str
    name: str
    num_bytes: int
    sha256: str
    media_type: str
    expires_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class NewJob:
    """A request that was judged good and waits to be written.

    Attributes:
        params: what to make, seed included.
        bundle: hash of the student bundle that shall make it; only a dispatcher of that bundle claims the job.
        content_key: hash of everything that decides the bytes; equal keys share a result.
        owner: name of the API key; empty without keys.
        is_preview: whether the listener wants a picture per step.
        is_detached: whether the job goes on when the client that sent it leaves.
        idempotency_key: of the client; empty for none.
        body_hash: of the request, to tell a replay from a misuse of the key.
        webhook_url: to call when the job is finished; empty for none.
        model: name that the client used for the bundle.
    """

    params: GenerateParams
    bundle: str
    content_key: str
    owner: str = ""
    is_preview: bool = False
    is_detached: bool = False
    idempotency_key: str = ""
    body_hash: str = ""
    webhook_url: str = ""
    model: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One row of the store at one moment; times are Unix seconds by the store's clock.

    Attributes:
        number: position in the order of arrival.
        id: unguessable.
        attempts: times that it was started, less those that ended with a killed server.
        is_alone: whether nothing may run beside it: it was running when a worker died.
        is_cancel_requested: whether its owner gave it up while it runs.
        lease_owner, lease_until: the dispatcher that runs it, and until when its word counts.
        is_reused: whether the result was there before the job was.
        error_code, error_message: why it failed; empty otherwise.
    """

    number: int
    id: str
    owner: str
    status: str
    bundle: str
    model: str
    content_key: str
    params: GenerateParams
    is_preview: bool
    is_detached: bool
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0
    is_alone: bool = False
    is_cancel_requested: bool = False
    is_reused: bool = False
    lease_owner: str = ""
    lease_until: float = 0.0
    timings_ms: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    peak_memory_mb: float | None = None
    error_code: str = ""
    error_message: str = ""
    webhook_url: str = ""
    result: Result | None = None

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def expires_at(self) -> float | None:
        return self.result.expires_at if self.result else None
