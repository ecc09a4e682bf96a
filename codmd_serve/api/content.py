"""The bytes of a finished video over HTTP: whole or in part, with an ETag. Knows where results are."""

import asyncio
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import HTTPException, Response
from starlette.responses import StreamingResponse

from codmd_serve.api.backend import Backend
from codmd_serve.errors import ConflictError, GoneError
from codmd_serve.jobs.states import Job, Result

SUFFIXES = {"video/mp4": "mp4", "image/gif": "gif", "image/webp": "webp"}
# What OpenAPI says of an answer that is a video.
CONTENT: dict[str, Any] = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in SUFFIXES}


def header_docs(**texts: str) -> dict[str, Any]:
    """What OpenAPI says of headers of an answer, by name, with `_` for `-`."""
    named = {name.replace("_", "-"): text for name, text in texts.items()}
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in named.items()}


def parameter_docs(**texts: str) -> dict[str, Any]:
    """What OpenAPI says of headers of a request, all optional, by name, with `_` for `-`."""
    common = {"in": "header", "required": False, "schema": {"type": "string"}}
    parameters = [{"name": name.replace("_", "-"), "description": text, **common} for name, text in texts.items()]
    return {"parameters": parameters}


FILE_HEADERS = header_docs(
    ETag="of the bytes; they never change",
    Accept_Ranges="bytes",
    Cache_Control="private, kept for a year",
    Content_Disposition="a file name with the seed",
    Content_Length="bytes that follow",
)
FILE_REQUEST = parameter_docs(
    Range="bytes=FIRST-LAST, one part",
    If_Range="an ETag: the range holds for these bytes only, else all are sent",
    If_None_Match="an ETag: 304 when the bytes are still these",
)


def file_answers(**more: str) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a GET of a video; `more` are further headers."""
    headers = {**FILE_HEADERS, **header_docs(**more)}
    part = {**headers, **header_docs(Content_Range="which bytes of how many")}
    return {
        200: {"description": "the video", "content": CONTENT, "headers": headers},
        206: {"description": "the part that Range asked for", "headers": part},
        304: {"description": "the ETag of If-None-Match still holds"},
    }


async def video_response(backend: Backend, job: Job, asked: Mapping[str, str], headers: Mapping[str, str]) -> Response:
    """Answer with the video of a job.

    Args:
        backend: where results are.
        job: any job.
        asked: headers of the request: Range, If-Range, If-None-Match.
        headers: more headers of the answer.

    Raises:
        ConflictError: there is no video, or not yet.
        GoneError: it is no longer kept.
        HTTPException: 416.
    """
    if job.status == "expired":
        raise GoneError("the video is no longer kept; ask for it again")
    if job.status in ("failed", "cancelled"):
        raise ConflictError(f"the job ended without a video: it is {job.status}", "no_video")
    if job.result is None:
        raise ConflictError(f"the job is {job.status}; its video is not ready", "not_finished")
    result = job.result
    size = await asyncio.to_thread(backend.results.size, result.name)
    if size != result.num_bytes:
        await backend.call(backend.store.mark_expired, job.id)
        raise GoneError("the video is no longer there; ask for it again")
    etag = f'"{result.sha256[:32]}"'
    common = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": f'inline; filename="codmd-{job.params.seed}.{SUFFIXES.get(result.media_type, "bin")}"',
        **headers,
    }
    if etag in [each.strip().removeprefix("W/") for each in asked.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=common)
    begin, end = 0, size
    if "range" in asked and asked.get("if-range", etag) == etag:
        part = parse_range(asked["range"], size)
        if part is not None:
            begin, end = part
            common["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    status = 206 if "Content-Range" in common else 200
    common["Content-Length"] = str(end - begin)
    return StreamingResponse(_bytes(backend, result, begin, end), status, common, result.media_type)


def _bytes(backend: Backend, result: Result, begin: int, end: int) -> Iterator[bytes]:
    yield from backend.results.read(result.name, begin, end)


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """Begin and end (excluded) of a Range header; None for one that is to be ignored.

    Raises:
        HTTPException: 416, no such bytes.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text.strip())
    if match is None or match.groups() == ("", ""):
        return None  # several parts, other units, nonsense: the whole is always a right answer
    first, last = match.groups()
    if first == "":
        begin, end = max(0, size - int(last)), size
    else:
        begin, end = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < begin:
            return None
    if begin >= end:
        raise HTTPException(416, f"the video has {size} bytes", {"Content-Range": f"bytes */{size}"})
    return begin, end
