"""POST /generate and GET /jobs/{id}: a body in, a video or a reason out; knows nothing of how videos are made."""

import asyncio
import contextlib
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from codmd_serve.api.schemas import ErrorBody, GenerateBody, JobBody, job_body, to_params
from codmd_serve.dispatcher import Dispatcher, Job
from codmd_serve.errors import CancelledError

MAX_WARNING_HEADER_CHARS = 1000
NOT_READY_RETRY_S = 5
REFUSALS: dict[int | str, dict[str, Any]] = {
    413: {"model": ErrorBody, "description": "the body is too large"},
    422: {"model": ErrorBody, "description": "the request cannot be served; says what would be accepted"},
    429: {"model": ErrorBody, "description": "the queue is full; Retry-After says when to come back"},
    500: {"model": ErrorBody, "description": "the video could not be made"},
    503: {"model": ErrorBody, "description": "the model is not loaded yet"},
}
VIDEO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the video",
        "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
        "headers": {
            name: {"description": description, "schema": {"type": "string"}}
            for name, description in {
                "Content-Location": "the job: /jobs/{id}",
                "X-Seed": "the seed that makes this video again",
                "Server-Timing": "queue, text, denoise, decode and encode, in milliseconds",
                "Warnings": "what the model could not take as asked, if anything; separated by semicolons",
            }.items()
        },
    }
}

router = APIRouter()


@router.post("/generate", response_class=Response, responses={**VIDEO, **REFUSALS}, summary="Make a video and wait")
async def generate(body: GenerateBody, request: Request) -> Response:
    """Make one video from a prompt. The answer is the mp4 itself."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    # While a worker that died is being replaced, jobs wait for the next one.
    if dispatcher.facts is None:
        raise HTTPException(503, "the model is not loaded yet", {"Retry-After": str(NOT_READY_RETRY_S)})
    job = dispatcher.submit(to_params(body, dispatcher.facts, dispatcher.config.max_pixels))
    try:
        await _finished_or_gone(job, request)
    finally:
        # Nobody else can be waiting for it. A finished job is left as it is.
        dispatcher.cancel(job)
    if not job.finished.is_set() or job.status == "cancelled":
        raise CancelledError("the client went away")
    if job.error is not None:
        raise job.error
    video = job.path.read_bytes()
    job.path.unlink()
    return Response(video, media_type="video/mp4", headers=_headers(job))


@router.get("/jobs/{job_id}", responses={404: {"model": ErrorBody}}, summary="What became of a recent request")
async def get_job(job_id: str, request: Request) -> JobBody:
    """Look up a recent request by the id in its Content-Location."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    job = dispatcher.job(job_id)
    if job is None:
        raise HTTPException(404, "no such job, or it was so long ago that it is forgotten")
    return job_body(job)


async def _finished_or_gone(job: Job, request: Request) -> None:
    waits = [asyncio.create_task(job.finished.wait()), asyncio.create_task(_disconnected(request))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await wait


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headers(job: Job) -> dict[str, str]:
    headers = {
        "Content-Location": f"/jobs/{job.id}",
        "X-Seed": str(job.params.seed),
        "Server-Timing": ", ".join(f"{stage};dur={value:.1f}" for stage, value in job.timings_ms.items()),
        "Content-Disposition": f'inline; filename="codmd-{job.params.seed}.mp4"',
    }
    if job.warnings:
        # Words of the prompt are in it: escaped, or one could not be sent and another could add a header.
        text = "; ".join(job.warnings).encode("unicode_escape").decode("ascii")
        headers["Warnings"] = text[:MAX_WARNING_HEADER_CHARS]
    return headers
