"""The OpenAI-style routes under /v1: the wire form of SGLang, vLLM-Omni, FastVideo and their clients, over our jobs.

Its inventor has closed his own service; client libraries still ship it. What differs here: cancelled is a status of
ours and shows as failed with code `cancelled`, and errors have the body of all our routes.
"""

import asyncio
import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException

from codmd_serve.api.backend import Backend, facts_of
from codmd_serve.api.content import FILE_REQUEST, file_answers, header_docs, video_response
from codmd_serve.api.errors import describe_problem, refusals
from codmd_serve.api.generate import SUBMIT_REQUEST, VIDEO, answer_video, server_timing, submit, wait_for_client
from codmd_serve.api.jobs import find_job
from codmd_serve.api.schemas import LOSSLESS, QUALITY_CRF, GenerateBody, error_of, qualities
from codmd_serve.api.security import owner_of
from codmd_serve.api.wire import DeletedVideo, ModelCard, ModelPage, VideoObject, VideoPage
from codmd_serve.config import FORMATS
from codmd_serve.errors import InvalidRequestError
from codmd_serve.jobs.states import Job
from codmd_serve.jobs.store import ServedModel

# Fields of the wire form that are ours too, and those whose form numbers may be text because the body is a form.
OWN = ("prompt", "model", "seed", "height", "width", "num_frames", "fps", "crf", "quality", "preview", "webhook_url")
NUMBERS = ("seed", "height", "width", "num_frames", "fps", "crf", "num_inference_steps", "guidance_scale", "n")
REFUSED = ("num_inference_steps", "guidance_scale", "negative_prompt")
IGNORED = ("user", "size", "seconds", "n", "input_reference")
MAX_SECONDS = 3600.0
STATUS = {"running": "in_progress", "cancelled": "failed", "expired": "completed"}
BODY_SCHEMA = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string"},
        "model": {"type": "string", "description": "a name of /v1/models"},
        "size": {"type": "string", "description": "WIDTHxHEIGHT", "examples": ["64x64"]},
        "seconds": {"type": "string", "description": "length; rounded to what the model can make"},
        "format": {"type": "string", "enum": list(FORMATS)},
        **{name: {"type": "integer"} for name in ("seed", "height", "width", "num_frames", "fps", "crf")},
        "quality": {"type": "string", "enum": [LOSSLESS, *QUALITY_CRF], "description": "as for /generate"},
        "preview": {"type": "boolean", "description": "as for /generate"},
        "webhook_url": {"type": "string", "description": "as for /generate"},
        "n": {"type": "integer", "description": "only 1"},
        "num_inference_steps": {"type": "integer", "description": "only the model's own number of steps"},
        "guidance_scale": {"type": "number", "description": "only 1: there is no guidance"},
        "negative_prompt": {"type": "string", "description": "not supported: there is no guidance"},
        "input_reference": {"type": "string", "description": "not supported: videos are made from text only"},
        "user": {"type": "string", "description": "ignored"},
    },
}
OPENAPI_BODY = {
    **SUBMIT_REQUEST,
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": BODY_SCHEMA} for kind in ("application/json", "multipart/form-data")},
    },
}

SYNC_HEADERS = header_docs(
    X_Request_Id="the job",
    X_Model="the name of the model",
    X_Inference_Time_S="all stages, without the queue",
    X_Stage_Durations="seconds by stage, a JSON object",
    X_Peak_Memory_MB="of the device",
)

router = APIRouter(prefix="/v1")


@router.get("/models", responses={200: {"model": ModelPage}, **refusals(401)}, summary="Models that are served")
async def list_models(request: Request) -> dict[str, Any]:
    """Names for `model`, the default first."""
    backend: Backend = request.app.state.backend
    return {"object": "list", "data": [_model(model) for model in backend.offered()]}


@router.get("/models/{name}", responses={200: {"model": ModelCard}, **refusals(401, 404)}, summary="One model")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """A model by its name."""
    backend: Backend = request.app.state.backend
    model = next((model for model in backend.offered() if model.name == name), None)
    if model is None:
        raise HTTPException(404, "no such model; /v1/models lists them")
    return _model(model)


def _model(model: ServedModel) -> dict[str, Any]:
    described: dict[str, Any] = {"id": model.name, "object": "model", "created": 0, "owned_by": "codmd-serve"}
    if model.facts is not None:
        described["qualities"] = qualities(model.facts)
        described["lossy"] = model.facts.lossy_beside or model.facts.lossy
    return described


@router.post(
    "/videos",
    responses={200: {"model": VideoObject}, **refusals(401, 409, 413, 422, 429, 503, 507)},
    summary="Make a video (OpenAI-style)",
    openapi_extra=OPENAPI_BODY,
)
async def create_video(request: Request) -> dict[str, Any]:
    """Take a job; JSON or multipart. Poll GET /v1/videos/{id}, then download its content."""
    backend: Backend = request.app.state.backend
    job, _ = await submit(backend, await _body(request), request, is_detached=True)
    return video_object(backend, job)


@router.post(
    "/videos/sync",
    response_class=Response,
    responses={
        200: {**VIDEO[200], "headers": {**VIDEO[200]["headers"], **SYNC_HEADERS}},
        **refusals(401, 409, 413, 422, 429, 500, 503, 507),
    },
    summary="Make a video and wait (vLLM-Omni and FastVideo)",
    openapi_extra=OPENAPI_BODY,
)
async def create_video_sync(request: Request) -> Response:
    """The file itself."""
    backend: Backend = request.app.state.backend
    job, _ = await submit(backend, await _body(request), request, is_detached=False)
    finished = await wait_for_client(backend, job, request, None)
    assert finished is not None
    stages = {stage: value / 1000 for stage, value in server_timing(finished).items()}
    headers = {
        "X-Request-Id": finished.id,
        "X-Model": finished.model.encode("ascii", "replace").decode(),
        "X-Inference-Time-S": f"{_inference_time_s(finished) or 0.0:.4f}",
        "X-Stage-Durations": json.dumps({stage: round(value, 4) for stage, value in stages.items()}),
        "X-Peak-Memory-MB": f"{finished.peak_memory_mb or 0.0:.1f}",
    }
    return await answer_video(backend, finished, request, headers)


@router.get(
    "/videos", responses={200: {"model": VideoPage}, **refusals(401, 404, 422)}, summary="Your videos (OpenAI-style)"
)
async def list_videos(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=40)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """A page; `after` is the last id of the page before."""
    backend: Backend = request.app.state.backend
    last = None if after is None else (await find_job(backend, after, request)).number
    jobs = await asyncio.to_thread(
        backend.store.list_jobs, owner_of(request), limit=limit + 1, after=last, is_ascending=order == "asc"
    )
    data = [video_object(backend, job) for job in jobs[:limit]]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(jobs) > limit}


@router.get(
    "/videos/{job_id}",
    responses={200: {"model": VideoObject}, **refusals(401, 404)},
    summary="One video (OpenAI-style)",
)
async def get_video(job_id: str, request: Request, response: Response) -> dict[str, Any]:
    """How far a video is; `openai-poll-after-ms` says when to ask again, which the `openai` package obeys."""
    backend: Backend = request.app.state.backend
    job = await find_job(backend, job_id, request)
    _, eta_s = await backend.position(job)
    response.headers["openai-poll-after-ms"] = str(poll_after_ms(eta_s))
    return video_object(backend, job)


@router.get(
    "/videos/{job_id}/content",
    response_class=Response,
    responses={**file_answers(), **refusals(401, 404, 409, 410, 416, 422)},
    summary="The bytes of a video (OpenAI-style)",
    openapi_extra=FILE_REQUEST,
)
async def get_content(job_id: str, request: Request, variant: str = "video") -> Response:
    """As GET /jobs/{id}/video."""
    backend: Backend = request.app.state.backend
    if variant != "video":
        raise InvalidRequestError("variant must be video: no thumbnails or sprite sheets are made", "variant")
    return await video_response(backend, await find_job(backend, job_id, request), request.headers, {})


@router.delete(
    "/videos/{job_id}",
    responses={200: {"model": DeletedVideo}, **refusals(401, 404)},
    summary="Cancel and forget a video (OpenAI-style)",
)
async def delete_video(job_id: str, request: Request) -> JSONResponse:
    """Cancels it if it is not finished; then it is found nowhere any more."""
    backend: Backend = request.app.state.backend
    job = await find_job(backend, job_id, request)
    if not job.is_final:
        await backend.cancel(job)
    await backend.call(backend.store.delete, job.id)
    return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})


def video_object(backend: Backend, job: Job) -> dict[str, Any]:
    """A job in the wire form; with the two fields that AIPerf reads."""
    channel = backend.hub.known(job.id)
    progress = 100 if job.status in ("completed", "expired") else 0
    if job.status == "running" and channel is not None:
        progress = min(99, int(100 * channel.progress))
    error = error_of(job)
    params = job.params
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": STATUS.get(job.status, job.status),
        "progress": progress,
        "prompt": params.prompt,
        "size": f"{params.width}x{params.height}",
        "seconds": f"{params.num_frames / params.fps:g}",
        "created_at": int(job.created_at),
        "completed_at": int(job.finished_at) if job.finished_at and progress == 100 else None,
        "expires_at": int(job.expires_at) if job.expires_at else None,
        "error": None if error is None else {"code": error.code, "message": error.message},
        "remixed_from_video_id": None,
        "seed": params.seed,
        "num_frames": params.num_frames,
        "fps": params.fps,
        "inference_time_s": _inference_time_s(job),
        "peak_memory_mb": job.peak_memory_mb,
    }


def poll_after_ms(eta_s: float | None) -> int:
    """Return how long a client waits before it asks again: a quarter of what is left, 50 ms to 5 s.

    Args:
        eta_s: seconds until the job is done; None where that is not known.
    """
    return 1000 if eta_s is None else round(min(5000.0, max(50.0, 250.0 * eta_s)))


def _inference_time_s(job: Job) -> float | None:
    stages_ms = [value for stage, value in job.timings_ms.items() if stage != "queue"]
    return round(sum(stages_ms) / 1000, 4) if stages_ms else None


async def _body(request: Request) -> GenerateBody:
    """The wire form as a body of ours.

    Raises:
        InvalidRequestError: says what would be accepted.
    """
    said = await _read(request)
    unknown = sorted(said.keys() - set(OWN) - set(REFUSED) - set(IGNORED) - {"format"})
    if unknown:
        raise InvalidRequestError(f"unknown field {unknown[0][:60]!r}; the fields are in /docs")
    if said.get("input_reference") not in (None, "", []):
        raise InvalidRequestError(
            "this model makes videos from text only: leave input_reference out", "input_reference"
        )
    if said.get("n") not in (None, 1):
        raise InvalidRequestError("n must be 1: send one request per video", "n")
    fields = {name: said[name] for name in (*OWN, *REFUSED, "format") if said.get(name) is not None}
    if said.get("size") is not None:
        fields |= _size(said["size"], fields)
    if said.get("seconds") is not None:
        if "num_frames" in fields:
            raise InvalidRequestError("give seconds or num_frames, not both", "seconds")
        fields["num_frames"] = _num_frames(request.app.state.backend, said["seconds"], fields)
    try:
        return GenerateBody.model_validate(fields)
    except ValidationError as error:
        message, field = describe_problem(error.errors()[0])
        raise InvalidRequestError(message, field) from None


async def _read(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _read_form(request)
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise InvalidRequestError("the body is neither JSON nor a form") from None
    if not isinstance(content, dict):
        raise InvalidRequestError("send a JSON object with at least a prompt")
    return content


async def _read_form(request: Request) -> dict[str, Any]:
    said: dict[str, Any] = {}
    try:
        async with request.form(max_files=1, max_fields=64, max_part_size=2**20) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    raise InvalidRequestError("this model makes videos from text only: send no file", name[:60])
                said[name] = _number(value) if name in NUMBERS else value
    except StarletteHTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidRequestError("the body is no form that can be read") from None
    return said


def _number(text: str) -> Any:
    """The number that a form field holds; what is none is judged later, by its name."""
    try:
        return int(text) if len(text) < 30 else text
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def _size(size: Any, fields: dict[str, Any]) -> dict[str, int]:
    width, separator, height = str(size).partition("x")
    is_good = separator and all(side.isascii() and side.isdecimal() and len(side) < 7 for side in (width, height))
    if not is_good:
        raise InvalidRequestError(f"size must be WIDTHxHEIGHT, for example 64x64, got {str(size)[:60]!r}", "size")
    if "width" in fields or "height" in fields:
        raise InvalidRequestError("give size, or width and height, not both", "size")
    return {"width": int(width), "height": int(height)}


def _num_frames(backend: Backend, seconds: Any, fields: dict[str, Any]) -> int:
    """Frames of the length asked for: the nearest number that the model can make."""
    facts = facts_of(backend.model(fields.get("model")))
    try:
        value = float(str(seconds))
    except ValueError:
        value = 0.0
    if not 0.0 < value <= MAX_SECONDS:
        raise InvalidRequestError(
            f"seconds must be above 0 and at most {MAX_SECONDS:g}, got {str(seconds)[:60]!r}", "seconds"
        )
    fps = fields.get("fps", facts.fps)
    frames = value * (fps if isinstance(fps, int) and 0 < fps <= 120 else facts.fps)
    return max(1, facts.frame_multiple * round((frames - 1) / facts.frame_multiple) + 1)
