"""GET, DELETE and events of jobs; what another API key sent is not found."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request, Response
from starlette.responses import StreamingResponse

from codmd_serve.api.backend import Backend
from codmd_serve.api.content import FILE_REQUEST, file_answers, parameter_docs, video_response
from codmd_serve.api.errors import refusals
from codmd_serve.api.schemas import JobBody, JobList, error_of, job_body
from codmd_serve.api.security import owner_of
from codmd_serve.errors import InvalidRequestError, StoreError
from codmd_serve.jobs.states import Job

KEEP_ALIVE_S = 15.0
POLL_S = 1.0
FILE_NAME = re.compile(r"[A-Za-z0-9-]{1,100}\.(mp4|gif|webp)")
KIND_OF_STATUS = {"completed": "done", "expired": "done"}
EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}

router = APIRouter()


async def find_job(backend: Backend, job_id: str, request: Request) -> Job:
    """A job of the caller.

    Raises:
        HTTPException: 404.
    """
    job = await backend.get(job_id, owner_of(request)) if job_id.isalnum() and len(job_id) <= 40 else None
    if job is None:
        raise HTTPException(404, "no such job, or it was so long ago that it is forgotten")
    return job


async def describe(backend: Backend, job: Job) -> JobBody:
    """The public view of a job at this moment."""
    position, eta_s = await backend.position(job)
    return job_body(job, backend.hub.known(job.id), position, eta_s, backend.waiting_for(job))


@router.get("/jobs", responses=refusals(401, 422), summary="Your jobs, newest first")
async def list_jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=40, description="`next` of the page before")] = None,
    status: Literal["queued", "running", "completed", "failed", "cancelled", "expired"] | None = None,
) -> JobList:
    """A page of jobs."""
    backend: Backend = request.app.state.backend
    last = None
    if after is not None:
        known = await backend.get(after, owner_of(request)) if after.isalnum() else None
        if known is None:
            raise InvalidRequestError("after must be `next` of a page", "after")
        last = known.number
    owner = owner_of(request)
    jobs = await asyncio.to_thread(
        backend.store.list_jobs, owner, limit=limit + 1, after=last, status=status, is_ascending=False
    )
    bodies = [await describe(backend, job) for job in jobs[:limit]]
    return JobList(jobs=bodies, next=jobs[limit - 1].id if len(jobs) > limit else None)


@router.get("/jobs/{job_id}", responses=refusals(401, 404), summary="What became of a request")
async def get_job(job_id: str, request: Request) -> JobBody:
    """Look up a request by the id in its Location or Content-Location."""
    backend: Backend = request.app.state.backend
    return await describe(backend, await find_job(backend, job_id, request))


@router.delete("/jobs/{job_id}", responses=refusals(401, 404), summary="Cancel a job")
async def cancel_job(job_id: str, request: Request) -> JobBody:
    """Cancel: at once while it waits, within one step or decoded chunk while it runs. The answer is the final state."""
    backend: Backend = request.app.state.backend
    job = await find_job(backend, job_id, request)
    return await describe(backend, job if job.is_final else await backend.cancel(job))


@router.get(
    "/jobs/{job_id}/video",
    response_class=Response,
    responses={**file_answers(X_Seed="the seed that makes this video again"), **refusals(401, 404, 409, 410, 416)},
    summary="The video of a finished job",
    openapi_extra=FILE_REQUEST,
)
async def get_video(job_id: str, request: Request) -> Response:
    """The bytes; Range, ETag and If-None-Match are obeyed."""
    backend: Backend = request.app.state.backend
    job = await find_job(backend, job_id, request)
    return await video_response(backend, job, request.headers, {"X-Seed": str(job.params.seed)})


@router.get(
    "/jobs/{job_id}/video/{name}",
    response_class=Response,
    responses={**file_answers(X_Seed="the seed that makes this video again"), **refusals(401, 404, 409, 410, 416)},
    summary="The same, under a name to save it by",
)
async def get_named_video(job_id: str, name: str, request: Request) -> Response:
    """As GET /jobs/{id}/video; `name` is what the file is called where it is saved, and decides nothing else."""
    if FILE_NAME.fullmatch(name) is None:
        raise HTTPException(404, "the name of a video is letters, digits and hyphens with .mp4, .gif or .webp")
    backend: Backend = request.app.state.backend
    job = await find_job(backend, job_id, request)
    headers = {"X-Seed": str(job.params.seed), "Content-Disposition": f'attachment; filename="{name}"'}
    return await video_response(backend, job, request.headers, headers)


@router.post("/jobs/{job_id}/leave", status_code=202, responses=refusals(401, 404), summary="Stop waiting for a job")
async def leave_job(job_id: str, request: Request) -> JobBody:
    """Say that this client is gone, as a closing tab does: the job is cancelled unless somebody follows its events,
    or begins to, within a few seconds."""
    backend: Backend = request.app.state.backend
    job = await find_job(backend, job_id, request)
    backend.leave(job)
    return await describe(backend, job)


@router.get(
    "/jobs/{job_id}/events",
    response_class=Response,
    responses={
        200: {"description": "Server-Sent Events", "content": {"text/event-stream": {"schema": EVENT}}},
        **refusals(401, 404),
    },
    summary="Follow a job",
    openapi_extra=parameter_docs(Last_Event_ID="the `id` of the last event that was seen; what came after it is sent"),
)
async def get_events(job_id: str, request: Request) -> Response:
    """Server-Sent Events; `data` is a JSON object.

    - `queued`: position, eta_s, attempt
    - `started`: attempt
    - `text`: the prompt is being embedded: done, total, progress
    - `step`: step, num_steps, progress, and preview, a data URL, where the request said `"preview": true`
    - `decoding`, `encoding`: frames, num_frames, progress
    - `done`, `failed`, `cancelled`: status, and error (code, message) of a job that failed; the stream ends

    A client that reconnects with `Last-Event-ID` gets what it missed, as far as that is kept. A comment line comes
    every 15 seconds.
    """
    backend: Backend = request.app.state.backend
    job = await find_job(backend, job_id, request)
    last = request.headers.get("last-event-id", "")
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(event_stream(backend, job, last), 200, headers, "text/event-stream")


async def event_stream(backend: Backend, job: Job, last_event_id: str = "") -> AsyncIterator[str]:
    """Lines of an event stream, to the end of the job or of the server."""
    epoch, _, seen = last_event_id.rpartition("-")
    last = int(seen) if epoch == backend.hub.epoch and seen.isdecimal() and len(seen) < 12 else 0
    loop = asyncio.get_running_loop()
    with backend.hub.listening(job.id) as channel:
        spoke_s = loop.time()
        yield "retry: 1000\n\n"
        while True:
            if loop.time() - spoke_s >= KEEP_ALIVE_S:
                spoke_s = loop.time()
                yield ": keep-alive\n\n"
            version = channel.version
            try:
                found = await backend.get(job.id, None)
                place = await backend.position(found) if found is not None and found.status == "queued" else (0, None)
            except StoreError:  # it may come back; the job is safe there
                await channel.changed(version, min(POLL_S, KEEP_ALIVE_S))
                continue
            if found is None:  # deleted
                yield f"event: cancelled\ndata: {json.dumps({'status': 'cancelled'})}\n\n"
                return
            job = found
            data: dict[str, Any] = {"status": job.status}
            if job.status == "queued":
                waiting_for = backend.waiting_for(job)
                queued = {"position": place[0], "eta_s": place[1], "attempt": job.attempts}
                if channel.version == version:  # else it may have begun, or ended, since it was read
                    channel.add("queued", queued | ({"waiting_for": waiting_for} if waiting_for else {}))
                    version = channel.version
            elif job.status == "running" and not any(event.kind == "started" for event in channel.events):
                channel.add("started", {"attempt": job.attempts})
            elif job.is_final:
                error = error_of(job)
                if error is not None and job.status == "failed":
                    data["error"] = {"code": error.code, "message": error.message}
                channel.add(KIND_OF_STATUS.get(job.status, job.status), data)
            for event in [event for event in channel.events if event.number > last]:
                last, spoke_s = event.number, loop.time()
                yield f"id: {backend.hub.epoch}-{last}\nevent: {event.kind}\ndata: {json.dumps(event.data)}\n\n"
            if job.is_final or backend.is_stopped:
                return
            await channel.changed(version, min(POLL_S, KEEP_ALIVE_S))
