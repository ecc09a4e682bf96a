"""The FastAPI application: routes, and the one table from errors to HTTP; knows nothing of how videos are made."""

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codmd_serve import __version__
from codmd_serve.api import generate
from codmd_serve.api.schemas import ErrorBody, HealthBody
from codmd_serve.dispatcher import Dispatcher
from codmd_serve.errors import CancelledError, CodmdError, GenerationError, InvalidRequestError, QueueFullError

# 499 is what others answer to a client that is gone; nobody reads it but the log.
STATUS_OF_ERROR: dict[type[CodmdError], int] = {
    InvalidRequestError: 422,
    QueueFullError: 429,
    CancelledError: 499,
    GenerationError: 500,
    CodmdError: 500,
}
CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
CODE_OF_STATUS |= {422: "invalid_request", 429: "queue_full", 499: "cancelled", 500: "internal_error", 503: "not_ready"}
UNAVAILABLE_CODES = ("shutting_down",)
MAX_ECHO_CHARS = 60

log = logging.getLogger(__name__)


def create_app(dispatcher: Dispatcher) -> FastAPI:
    """Build the application around a dispatcher, which it starts and stops.

    Args:
        dispatcher: not started yet.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await dispatcher.start()
        try:
            yield
        finally:
            await dispatcher.stop()

    app = FastAPI(
        title="codmd-serve",
        version=__version__,
        description="Text to video with few-step distilled Wan students.",
        lifespan=lifespan,
    )
    app.state.dispatcher = dispatcher
    app.add_middleware(BodyLimit, max_body_bytes=dispatcher.config.max_body_bytes)
    app.include_router(generate.router)
    app.add_api_route("/health", health, summary="Is the process alive")
    app.add_api_route("/ready", ready, summary="Is the model warm", responses={503: {"model": HealthBody}})
    app.add_exception_handler(CodmdError, _on_codmd_error)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(Exception, _on_bug)
    return app


async def health(request: Request) -> HealthBody:
    """Always 200 while the process lives; says whether a model is warm and how long the queue is."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    return HealthBody(
        status="ok",
        is_ready=dispatcher.is_ready,
        model=asdict(dispatcher.facts) if dispatcher.facts else None,
        num_waiting=len(dispatcher.waiting),
        is_running=dispatcher.running is not None,
        num_worker_restarts=dispatcher.num_restarts,
    )


async def ready(request: Request, response: Response) -> HealthBody:
    """200 once the served shape is warm, 503 before, and while a worker that died is being replaced."""
    body = await health(request)
    response.status_code = 200 if body.is_ready else 503
    return body


def _answer(status: int, message: str, *, code: str | None = None, field: str | None = None) -> JSONResponse:
    detail = {"code": code or CODE_OF_STATUS.get(status, "error"), "message": message, "field": field}
    return JSONResponse(ErrorBody.model_validate({"error": detail}).model_dump(exclude_none=True), status)


async def _on_codmd_error(_: Request, error: Exception) -> Response:
    status = next(STATUS_OF_ERROR[kind] for kind in type(error).__mro__ if kind in STATUS_OF_ERROR)
    code = error.code if isinstance(error, GenerationError) else None
    if code in UNAVAILABLE_CODES:
        status = 503
    answer = _answer(status, str(error), code=code, field=getattr(error, "field", None))
    if isinstance(error, QueueFullError):
        answer.headers["Retry-After"] = str(error.retry_after_s)
    return answer


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:  # what FastAPI makes of bytes that are no text, nesting or digits without end
        return _answer(422, "the body cannot be read as JSON")
    answer = _answer(error.status_code, str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


async def _on_invalid_body(_: Request, error: Exception) -> Response:
    """The first problem, as one sentence. What came is not sent back: it may be long, and it may be anything."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"] if part != "body"]
    field = path[0] if path else None
    message = str(problem["msg"])
    if problem["type"] == "extra_forbidden":
        message, field = f"unknown field {str(field)[:MAX_ECHO_CHARS]!r}; the fields are in /docs", None
    elif problem["type"] == "json_invalid":
        message, field = f"the body is not JSON: {problem['ctx']['error']}", None
    elif field is None:
        message = "send a JSON object with at least a prompt, and the header content-type: application/json"
    else:
        message = f"{field}: {message.removeprefix('Value error, ')}"
    return _answer(422, message, field=field)


async def _on_bug(request: Request, error: Exception) -> Response:
    log.error("path=%s unexpected error", request.url.path, exc_info=error)
    return _answer(500, "internal error; the server's log has the details")


class BodyLimit:
    """ASGI middleware that stops reading a body past a bound, whatever its headers promise."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                raise HTTPException(413, f"the body is larger than {self.max_body_bytes} bytes")
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)
