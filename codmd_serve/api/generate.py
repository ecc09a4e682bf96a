"""POST /generate: a body in, a video or a job out; knows nothing of how videos are made."""

import asyncio
import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from codmd_serve.api.backend import Backend, facts_of, failure
from codmd_serve.api.content import CONTENT, FILE_HEADERS, header_docs, parameter_docs, video_response
from codmd_serve.api.errors import refusals
from codmd_serve.api.jobs import describe
from codmd_serve.api.schemas import GenerateBody, JobBody, to_params
from codmd_serve.api.security import check_rate, owner_of
from codmd_serve.api.webhooks import check_webhook_url
from codmd_serve.errors import CancelledError, GenerationError, InvalidRequestError
from codmd_serve.jobs.states import Job, NewJob

MAX_WARNING_HEADER_CHARS = 1000
MAX_WAIT_S = 86_400
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
VIDEO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the video",
        "content": CONTENT,
        "headers": {
            **FILE_HEADERS,
            **header_docs(
                Content_Location="the job: /jobs/{id}",
                X_Seed="the seed that makes this video again",
                Server_Timing="queue, text, denoise, decode and encode, in milliseconds",
                Warnings="what the model could not take as asked, if anything; separated by semicolons",
                Cache_Control="no-store",
            ),
        },
    },
    202: {
        "model": JobBody,
        "description": "accepted; asked for with Prefer: respond-async or Prefer: wait=N",
        "headers": header_docs(Location="the job: /jobs/{id}", Preference_Applied="which preference was followed"),
    },
}
WAIT_REQUEST = parameter_docs(
    Prefer="respond-async: answer 202 at once; wait=N: answer 202 if the video is not there in N seconds",
)
SUBMIT_REQUEST = parameter_docs(
    Idempotency_Key="the same key and body is the same job, however often it is sent",
    Cache_Control="no-cache: make the video again although an equal request has been answered",
)

router = APIRouter()


@router.post(
    "/generate",
    response_class=Response,
    responses={**VIDEO, **refusals(401, 409, 413, 422, 429, 500, 503, 507)},
    summary="Make a video and wait, or get a job",
    openapi_extra={"parameters": WAIT_REQUEST["parameters"] + SUBMIT_REQUEST["parameters"]},
)
async def generate(body: GenerateBody, request: Request) -> Response:
    """Make one video from a prompt. The answer is the file itself, or with `Prefer: respond-async` the job."""
    backend: Backend = request.app.state.backend
    is_async, wait_s = parse_prefer(request.headers)
    job, _ = await submit(backend, body, request, is_detached=is_async)
    if not is_async:
        finished = await wait_for_client(backend, job, request, wait_s)
        if finished is not None:
            return await answer_video(backend, finished, request)
        job = await backend.get(job.id, None) or job
    if not job.is_detached:
        await backend.call(backend.store.keep, job.id)
    headers = {"Location": f"/jobs/{job.id}", "Preference-Applied": "respond-async" if is_async else f"wait={wait_s}"}
    body_ = await describe(backend, job)
    return JSONResponse(body_.model_dump(), 202, headers)


async def submit(
    backend: Backend, body: GenerateBody, request: Request, is_detached: bool, key: str = ""
) -> tuple[Job, bool]:
    """Judge a body and write the job that it asks for; see Backend.submit."""
    check_rate(request)
    model = backend.model(body.model)
    params = to_params(body, facts_of(model), backend.config.max_pixels, model.teacher)
    if body.webhook_url is not None:
        check_webhook_url(body.webhook_url, backend.config)
    key = key or request.headers.get("idempotency-key", "")
    if key and IDEMPOTENCY_KEY.fullmatch(key) is None:
        raise InvalidRequestError("Idempotency-Key must be 1..255 printable ASCII characters without spaces")
    said = json.dumps([request.url.path, body.model_dump(exclude_unset=True)], sort_keys=True)
    new = NewJob(
        params=params,
        bundle=model.bundle,
        content_key=backend.content_key(model, params),
        owner=owner_of(request),
        is_preview=body.preview,
        is_detached=is_detached,
        idempotency_key=key,
        body_hash=hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest(),
        webhook_url=body.webhook_url or "",
        model=model.name,
    )
    may_reuse = "no-cache" not in request.headers.get("cache-control", "").lower()
    job, is_new = await backend.submit(new, model, may_reuse)
    request.app.state.metrics.submitted(job, is_new)
    return job, is_new


async def wait_for_client(backend: Backend, job: Job, request: Request, wait_s: float | None) -> Job | None:
    """The final job, or None when `wait_s` is over.

    Raises:
        CancelledError: the client went away. The job is given up unless somebody else may want it.
        GenerationError: it failed, or code shutting_down.
    """
    waiting = asyncio.create_task(backend.wait(job, wait_s))
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await backend.abandon(job)
            raise CancelledError("the client went away")
    except asyncio.CancelledError:  # the server ends this request
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        raise
    finally:
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
    try:
        finished = waiting.result()
    except GenerationError as error:
        error.headers = {"Content-Location": f"/jobs/{job.id}"}  # type: ignore[attr-defined]
        raise
    if not finished.is_final:
        return None
    if finished.status == "cancelled":
        raise CancelledError("the job was cancelled")
    if finished.status == "failed":
        raise failure(finished)
    return finished


async def answer_video(backend: Backend, job: Job, request: Request, more: Mapping[str, str] | None = None) -> Response:
    """200 with the bytes and how they were made."""
    # Ranges are for /jobs/{id}/video: this is the answer to a POST.
    return await video_response(backend, job, {}, {**job_headers(job), "Cache-Control": "no-store", **(more or {})})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def parse_prefer(headers: Mapping[str, str]) -> tuple[bool, float | None]:
    """Whether the client wants a job at once, and else how many seconds it waits; None is for as long as it takes.

    Source: RFC 7240; what is not understood is ignored.
    """
    preferences = [each.strip().lower() for each in headers.get("prefer", "").split(",")]
    waits = [re.fullmatch(r"wait\s*=\s*\"?(\d{1,9})\"?", each) for each in preferences]
    wait_s = next((min(MAX_WAIT_S, int(match[1])) for match in waits if match), None)
    if "respond-async" in preferences and not wait_s:
        return True, None
    return False, None if wait_s is None else float(wait_s)


def job_headers(job: Job) -> dict[str, str]:
    """What the answer with a video says about it."""
    headers = {
        "Content-Location": f"/jobs/{job.id}",
        "X-Seed": str(job.params.seed),
        "Server-Timing": ", ".join(f"{stage};dur={value:.1f}" for stage, value in server_timing(job).items()),
    }
    if job.warnings:
        # Words of the prompt are in it: escaped, or one could not be sent and another could add a header.
        text = "; ".join(job.warnings).encode("unicode_escape").decode("ascii")
        headers["Warnings"] = text[:MAX_WARNING_HEADER_CHARS]
    return headers


def server_timing(job: Job) -> dict[str, float]:
    """Milliseconds by stage; all zero for a video that was there already."""
    return job.timings_ms or dict.fromkeys(("queue", "text", "denoise", "decode", "encode"), 0.0)
