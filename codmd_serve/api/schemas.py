"""What a request may say and what an answer looks like; judges a body without knowing how videos are made."""

import secrets
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictFloat, StrictInt, field_validator

from codmd_serve.config import DEFAULT_CRF, MAX_PROMPT_CHARS, MAX_SEED, GenerateParams, ModelFacts, TeacherFacts
from codmd_serve.errors import InvalidRequestError
from codmd_serve.jobs.events import Channel
from codmd_serve.jobs.states import Job
from codmd_serve.prompts import is_blank

# Twice in each direction, or four times as long: past that a student shows nothing that it was trained to show.
DEFAULT_BUDGET_FACTOR = 4
MAX_GIF_FPS = 50  # a delay counts in hundredths of a second, and browsers slow the shortest one down to a tenth
QUALITY_CRF = {"high": DEFAULT_CRF, "medium": 23, "low": 28}
LOSSLESS = "lossless"
EXAMPLES: list[JsonValue] = [
    {"prompt": "a red circle moves right quickly on a black background", "seed": 7},
    {"prompt": "a yellow square moves left quickly on a black background"},
    {"prompt": "a purple cross moves up quickly on a black background"},
    {"prompt": "a white ring moves right slowly on a navy background", "seed": 1, "quality": "medium"},
    {"prompt": "a white triangle moves down quickly on a black background"},
]


class GenerateBody(BaseModel):
    """One video. Whatever is left out is what the model was trained at."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": EXAMPLES})

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS, description="what to show; not blank")]
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="the same seed gives the same video; drawn when absent, and told in X-Seed"
    )
    height: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = Field(None, description="pixels, a multiple of 16")
    width: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = Field(None, description="pixels, a multiple of 16")
    num_frames: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = Field(None, description="4k + 1")
    fps: Annotated[StrictInt, Field(ge=1, le=120)] | None = Field(None, description="frames per second of playback")
    crf: Annotated[StrictInt, Field(ge=1, le=51)] | None = Field(
        None, description=f"H.264 rate factor: 1 best, 51 smallest, {DEFAULT_CRF} unless said"
    )
    quality: Literal["lossless", "high", "medium", "low"] | None = Field(
        None,
        description="lossless: the exact engine, as without it; the others stand for a crf, and the lossy engine "
        "where /v1/models names one",
    )
    format: Literal["mp4", "gif", "webp"] = Field("mp4", description="H.264, or an animated picture")
    preview: StrictBool = Field(False, description="a picture of the video to come with each step of /jobs/{id}/events")
    webhook_url: Annotated[str, Field(max_length=2000)] | None = Field(
        None, description="https address to call when the job is finished; off unless the operator allows its host"
    )
    model: Annotated[str, Field(max_length=200)] | None = Field(None, description="a name of /v1/models")
    num_inference_steps: StrictInt | None = Field(None, description="only the model's own number of steps")
    guidance_scale: StrictInt | StrictFloat | None = Field(None, description="only 1: there is no guidance")
    negative_prompt: str | None = Field(None, description="not supported: there is no guidance")

    @field_validator("prompt")
    @classmethod
    def _is_not_blank(cls, prompt: str) -> str:
        if is_blank(prompt):
            raise ValueError("must not be blank")
        return prompt


class ErrorDetail(BaseModel):
    """What went wrong: a stable code, one sentence, and the field it is about where there is one."""

    code: str
    message: str
    field: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class JobBody(BaseModel):
    """What is known about a job. Times are RFC 3339 in UTC."""

    id: str
    status: Literal["queued", "running", "completed", "failed", "cancelled", "expired"]
    progress: float = Field(description="0..1, in all")
    step: int = Field(description="denoising steps done")
    stage: str = Field(description="text, denoise, decode or encode; empty before it starts")
    position: int | None = Field(description="jobs that wait before this one; null unless it is queued")
    eta_s: float | None = Field(description="seconds until it is done, as far as that is known")
    waiting_for: str | None = Field(description="what is missing beside its turn, as a worker that serves its bundle")
    model: str
    seed: int
    params: dict[str, Any]
    timings_ms: dict[str, float]
    inference_time_s: float | None
    peak_memory_mb: float | None
    attempts: int
    warnings: list[str]
    error: ErrorDetail | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    expires_at: str | None


class JobList(BaseModel):
    """A page of jobs, newest first; `next` is the `after` of the next page."""

    jobs: list[JobBody]
    next: str | None


class HealthBody(BaseModel):
    """How the server is; answered without touching the device."""

    status: Literal["ok"]
    is_ready: StrictBool
    reason: str = Field(description="why it is not ready; empty when it is")
    model: dict[str, Any] | None
    num_waiting: int
    is_running: StrictBool
    num_running: int
    num_workers: int
    num_worker_restarts: int
    num_unserved: int = Field(description="jobs that wait for a bundle that no live worker serves")
    version: str


def job_body(
    job: Job, channel: Channel | None, position: int, eta_s: float | None, waiting_for: str | None = None
) -> JobBody:
    """The public view of a job; where its video lies stays private.

    Args:
        job: as the store has it.
        channel: what is heard of it while it runs; None when nothing is.
        position, eta_s: of Backend.position.
        waiting_for: of Backend.waiting_for.
    """
    is_running = job.status == "running" and channel is not None
    progress = 1.0 if job.status in ("completed", "expired") else channel.progress if is_running and channel else 0.0
    stages_ms = {stage: value for stage, value in job.timings_ms.items() if stage != "queue"}
    return JobBody(
        id=job.id,
        status=job.status,  # type: ignore[arg-type]
        progress=round(progress, 3),
        step=channel.step if is_running and channel else 0,
        stage=channel.stage if is_running and channel else "",
        position=position if job.status == "queued" else None,
        eta_s=eta_s,
        waiting_for=waiting_for,
        model=job.model,
        seed=job.params.seed,
        params={name: getattr(job.params, name) for name in GenerateParams.__slots__},
        timings_ms={stage: round(value, 1) for stage, value in job.timings_ms.items()},
        inference_time_s=round(sum(stages_ms.values()) / 1000, 4) if stages_ms else None,
        peak_memory_mb=job.peak_memory_mb,
        attempts=job.attempts,
        warnings=job.warnings,
        error=error_of(job),
        created_at=rfc3339(job.created_at),
        started_at=None if job.started_at is None else rfc3339(job.started_at),
        finished_at=None if job.finished_at is None else rfc3339(job.finished_at),
        expires_at=None if job.expires_at is None else rfc3339(job.expires_at),
    )


def error_of(job: Job) -> ErrorDetail | None:
    """Why a job has no video, if it has none for good."""
    if job.status == "failed":
        return ErrorDetail(code=job.error_code, message=job.error_message)
    if job.status == "cancelled":
        return ErrorDetail(code="cancelled", message="the job was cancelled")
    return None


def rfc3339(seconds: float) -> str:
    """Unix seconds as 2026-11-26T12:00:00.000Z."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def pixel_budget(facts: ModelFacts, max_pixels: int = 0) -> int:
    """Return the largest height * width * num_frames that is accepted; for `max_pixels` see `to_params`."""
    budget_px = max_pixels or DEFAULT_BUDGET_FACTOR * facts.height * facts.width * facts.num_frames
    return min(budget_px, facts.max_video_px or budget_px)


def to_params(
    body: GenerateBody, facts: ModelFacts, max_pixels: int = 0, teacher: TeacherFacts | None = None
) -> GenerateParams:
    """Complete a body with what the model was trained at, and refuse what the model cannot do.

    Args:
        body: well-formed.
        facts: of the loaded model.
        max_pixels: operator's bound on height * width * num_frames; 0 is four times the model's own. What the memory
            of the device has no room for is refused whatever the bound.
        teacher: that shall make it; None is the student.

    Raises:
        InvalidRequestError: names the field and what would be accepted.
    """
    if teacher is None:
        _refuse_guidance(body, facts)
    else:
        _refuse_other_sampling(body, teacher)
    if body.crf is not None and body.quality in QUALITY_CRF:
        raise InvalidRequestError("give crf or quality, not both", "quality")
    if body.quality == LOSSLESS and facts.lossy:
        accepted = ", ".join(qualities(facts))
        raise InvalidRequestError(
            f"quality lossless needs an exact engine, this server has {facts.lossy}: {accepted} would be accepted",
            "quality",
        )
    params = GenerateParams(
        prompt=body.prompt,
        # 32 bits, so that JavaScript clients and torch.manual_seed can both repeat it.
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
        height=body.height or facts.height,
        width=body.width or facts.width,
        num_frames=body.num_frames or facts.num_frames,
        fps=body.fps or facts.fps,
        crf=body.crf or QUALITY_CRF.get(body.quality or "", DEFAULT_CRF),
        format=body.format,
        may_be_lossy=bool(facts.lossy_beside) and body.quality in QUALITY_CRF and teacher is None,
        teacher="" if teacher is None else teacher.fingerprint,
    )
    if params.format == "gif":
        _check_gif(body, params)
    _check_shape(params, facts, pixel_budget(facts, max_pixels))
    return params


def qualities(facts: ModelFacts) -> list[str]:
    """Words for `quality` that a model takes."""
    return [*([] if facts.lossy else [LOSSLESS]), *QUALITY_CRF]


def _refuse_guidance(body: GenerateBody, facts: ModelFacts) -> None:
    if body.negative_prompt:
        raise InvalidRequestError(
            "this is a distilled student, which has no guidance and so no use for a negative prompt: leave it out",
            "negative_prompt",
        )
    if body.guidance_scale not in (None, 1):
        raise InvalidRequestError(
            "this is a distilled student, which has the teacher's guidance built in: leave guidance_scale out",
            "guidance_scale",
        )
    if body.num_inference_steps not in (None, facts.num_steps):
        raise InvalidRequestError(
            f"this is a distilled student, which was trained for exactly {facts.num_steps} steps: "
            f"leave num_inference_steps out or say {facts.num_steps}",
            "num_inference_steps",
        )


def _refuse_other_sampling(body: GenerateBody, teacher: TeacherFacts) -> None:
    settled = {"guidance_scale": teacher.guidance_scale, "num_inference_steps": teacher.num_steps}
    for name, value in settled.items():
        if getattr(body, name) not in (None, value):
            raise InvalidRequestError(f"this teacher is served with {name} {value:g} only: leave it out", name)
    if body.negative_prompt:
        raise InvalidRequestError(
            "this teacher is served with the negative prompt of its folder only: leave negative_prompt out",
            "negative_prompt",
        )


def _check_gif(body: GenerateBody, params: GenerateParams) -> None:
    for name in ("crf", "quality"):
        if getattr(body, name) not in (None, LOSSLESS):
            raise InvalidRequestError(f"a gif has 256 colours and no rate factor: leave {name} out", name)
    if params.fps > MAX_GIF_FPS:
        raise InvalidRequestError(
            f"fps of a gif must be 1..{MAX_GIF_FPS}, which is what browsers play, got {params.fps}", "fps"
        )


def _check_shape(params: GenerateParams, facts: ModelFacts, max_pixels: int) -> None:
    step = facts.size_multiple
    for name in ("height", "width"):
        value = getattr(params, name)
        if value % step or value > facts.max_side_px:
            raise InvalidRequestError(
                f"{name} must be a multiple of {step} up to {facts.max_side_px}, got {value}; "
                f"{_nearest(value, step, 0, facts.max_side_px)} would be accepted",
                name,
            )
    step = facts.frame_multiple
    affordable = max_pixels // (params.height * params.width)
    if affordable < 1:
        raise InvalidRequestError(
            f"one frame of {params.width}x{params.height} is more than the {max_pixels} pixels that this server makes "
            "of a whole video; a smaller height or width would be accepted"
        )
    # The largest number that would be taken, not the largest that memory has room for.
    most = (min(facts.max_num_frames, affordable) - 1) // step * step + 1
    if (params.num_frames - 1) % step or params.num_frames > most:
        raise InvalidRequestError(
            f"num_frames must be {step}k + 1, and at {params.width}x{params.height} up to {most}, "
            f"got {params.num_frames}; {_nearest(params.num_frames, step, 1, most)} would be accepted",
            "num_frames",
        )


def _nearest(value: int, step: int, offset: int, most: int) -> int:
    """The number closest to value that is step * k + offset, positive and at most `most`."""
    nearest = round((value - offset) / step) * step + offset
    return max(step if offset == 0 else offset, min(nearest, (most - offset) // step * step + offset))
