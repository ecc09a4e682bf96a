"""The one table from errors to HTTP, and the one body of every answer that is not a success."""

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from codmd_serve.api.schemas import ErrorBody
from codmd_serve.errors import (
    CancelledError,
    CodmdError,
    ConflictError,
    GenerationError,
    GoneError,
    InvalidRequestError,
    QueueFullError,
    StorageFullError,
    StoreError,
)

# 499 is what others answer to a client that is gone; nobody reads it but the log.
STATUS_OF_ERROR: dict[type[CodmdError], int] = {
    InvalidRequestError: 422,
    QueueFullError: 429,
    ConflictError: 409,
    GoneError: 410,
    CancelledError: 499,
    StorageFullError: 507,
    StoreError: 503,
    GenerationError: 500,
    CodmdError: 500,
}
CODE_OF_STATUS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    410: "expired",
    413: "body_too_large",
    416: "range_not_satisfiable",
    421: "host_not_allowed",
    422: "invalid_request",
    429: "queue_full",
    499: "cancelled",
    500: "internal_error",
    503: "store_unavailable",
    507: "storage_full",
}
# Codes of a failed job that are not the plain 500.
STATUS_OF_CODE = {
    "shutting_down": 503,
    "not_ready": 503,
    "storage_full": 507,
    "cancelled": 409,
    "server_stopped": 503,
    "not_served": 503,
}
# Every code that an answer or a job may carry, for /docs and docs/.
CODES = {
    "invalid_request": "422: the request cannot be served; the message says what would be accepted",
    "bad_request": "400: the request is not HTTP that makes sense",
    "too_many_connections": "503: too many connections are open",
    "server_stopped": "503: the server that ran the job was stopped on every attempt",
    "unauthorized": "401: no API key, or an unknown one",
    "forbidden": "403: another web site sent this request",
    "not_found": "404: no such route, no such job, or a job of another API key",
    "method_not_allowed": "405: the route has other methods",
    "request_timeout": "408: the body did not arrive in time",
    "conflict": "409: the request contradicts what is there",
    "not_finished": "409: the job has no video yet",
    "no_video": "409: the job ended without a video",
    "idempotency_conflict": "409: the Idempotency-Key was used with another body",
    "expired": "410: the video is no longer kept",
    "body_too_large": "413: the body is larger than the server takes",
    "range_not_satisfiable": "416: the video has no such bytes",
    "host_not_allowed": "421: the Host header names another server; the operator can allow it",
    "queue_full": "429: no place in the queue; Retry-After says when to come back",
    "quota_exceeded": "429: this API key has its share of the queue",
    "rate_limited": "429: this API key sent too many jobs in a minute",
    "cancelled": "499 or 409: the job was cancelled",
    "internal_error": "500: a bug; the server's log has the details",
    "generation_failed": "500: the video could not be made",
    "out_of_memory": "500: the device has no room for this shape",
    "device_error": "500: the device failed; the worker was replaced",
    "worker_died": "500: the worker died on every attempt of this job",
    "worker_hung": "500: the worker made no progress on any attempt of this job",
    "worker_lost": "500: the machine that ran the job was not heard of again, on every attempt",
    "not_served": "503: no worker of its bundle was there for `--unserved-hours`",
    "worker_fatal": "500: the model cannot be loaded",
    "no_teacher": "500: the teacher that the job was for is not served any more",
    "non_finite": "500: the network or the VAE gave values that are not finite",
    "wrong_vae": "500: the bundle's VAE makes frames of another size than it says",
    "encode_failed": "500: ffmpeg could not encode the video",
    "encoder_hung": "500: ffmpeg made no progress",
    "encoder_missing": "500: the server has no ffmpeg that works",
    "storage_unwritable": "500: videos cannot be kept; no job starts until they can",
    "not_ready": "503: nothing is known about the model yet",
    "shutting_down": "503: the server stops; an accepted job goes on when it is back",
    "store_unavailable": "503: the job store cannot be used",
    "storage_full": "507: no room to keep a video or a job",
}
MAX_ECHO_CHARS = 60
RETRY_AFTER_S = {"not_ready": 5, "shutting_down": 10, "store_unavailable": 5, "storage_full": 30}

logger = logging.getLogger(__name__)


def error_response(status: int, message: str, *, code: str | None = None, field: str | None = None) -> JSONResponse:
    """The answer to a request that is not a success."""
    code = code or CODE_OF_STATUS.get(status, "error")
    body = ErrorBody.model_validate({"error": {"code": code, "message": message, "field": field}})
    answer = JSONResponse(body.model_dump(), status)
    if code in RETRY_AFTER_S and status in (503, 507):
        answer.headers["Retry-After"] = str(RETRY_AFTER_S[code])
    return answer


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Descriptions of refusals, for /docs."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        lines = [f"`{code}`: {text.partition(': ')[2]}" for code, text in CODES.items() if str(status) in text[:10]]
        found[status] = {"model": ErrorBody, "description": "; ".join(lines) or "refused"}
        if status in (429, 503, 507):
            text = "seconds after which to come back"
            found[status]["headers"] = {"Retry-After": {"description": text, "schema": {"type": "string"}}}
    return found


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of the application its one body."""
    app.add_exception_handler(CodmdError, on_codmd_error)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(Exception, _on_bug)


async def on_codmd_error(request: Request, error: Exception) -> Response:
    """The answer to an error that was raised on purpose."""
    status = next(STATUS_OF_ERROR[kind] for kind in type(error).__mro__ if kind in STATUS_OF_ERROR)
    code = getattr(error, "code", None)
    message = str(error)
    if isinstance(error, GenerationError):
        status = STATUS_OF_CODE.get(error.code, status)
    if isinstance(error, StoreError | StorageFullError):
        # They name the store or a folder, which is for the log only.
        logger.error("%s", error)
        message = "no room to keep a video or a job" if status == 507 else "the job store cannot be used at the moment"
    answer = error_response(status, message, code=code, field=getattr(error, "field", None))
    request.app.state.metrics.refused(code or CODE_OF_STATUS.get(status, "internal_error"))
    if isinstance(error, QueueFullError):
        answer.headers["Retry-After"] = str(error.retry_after_s)
    for name, value in getattr(error, "headers", {}).items():
        answer.headers[name] = value
    return answer


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:  # what FastAPI makes of bytes that are no text, nesting or digits without end
        return error_response(422, "the body cannot be read as JSON")
    answer = error_response(error.status_code, str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


async def _on_invalid_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, field = describe_problem(error.errors()[0])
    return error_response(422, message, field=field)


def describe_problem(problem: Any) -> tuple[str, str | None]:
    """The first problem, as one sentence. What came is not sent back: it may be long, and it may be anything."""
    path = [str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header")]
    field = path[0] if path else None
    message = str(problem["msg"])
    if problem["type"] == "extra_forbidden":
        return f"unknown field {str(field)[:MAX_ECHO_CHARS]!r}; the fields are in /docs", None
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}", None
    if field is None:
        return "send a JSON object with at least a prompt, and the header content-type: application/json", None
    return f"{field}: {message.removeprefix('Value error, ')}", field


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("path=%s unexpected error", request.url.path, exc_info=error)
    return error_response(500, "internal error; the server's log has the details")
