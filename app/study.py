"""The page of the blind pairwise study: plain HTML and a few JSON routes over a study that it is given.

It knows no arm, no file of the study but the one it sends, and imports neither the server nor the trainer. Nothing is
loaded from another host, and a Content-Security-Policy keeps it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

PAGE = Path(__file__).with_suffix(".html")
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "media-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-robots-tag": "noindex",
    "cache-control": "no-store",
}
# The same for every video: the time of a file would tell in which order the arms were copied.
VIDEO_DATE = "Thu, 01 Jan 1970 00:00:00 GMT"
MAX_BODY_BYTES = 16_384

Answer = Literal["left", "right", "same", "bad"]


class Study(Protocol):
    """What the page asks; distill.evaluate.study.session.StudySession answers."""

    def about(self) -> dict[str, Any]:
        """Return title and number of pairs."""

    def enrol(self, *, is_automated: bool = False) -> str:
        """Take in a rater; return the id."""

    def state(self, rater: str) -> dict[str, Any]:
        """Return progress and the current pair."""

    def answer(
        self, rater: str, number: int, answers: dict[str, str], plays: tuple[int, int], note: str = ""
    ) -> dict[str, Any]:
        """Take the answers of a pair; return the next state."""

    def video(self, token: str) -> Path:
        """Return the file of an address."""


class Enrolment(BaseModel):
    """Body of POST /api/raters; is_automated is what the browser says of itself (navigator.webdriver)."""

    model_config = ConfigDict(extra="forbid")
    is_automated: bool = False


class Answers(BaseModel):
    """Body of POST /api/raters/ID/answers."""

    model_config = ConfigDict(extra="forbid")
    trial: Annotated[int, Field(ge=0, lt=2**31)]
    answers: Annotated[dict[str, Answer], Field(max_length=16)]
    plays: tuple[int, int]
    note: Annotated[str, Field(max_length=500)] = ""


def build_app(study: Study, statuses: Mapping[type[Exception], int]) -> FastAPI:
    """Build the application.

    Args:
        study: what is shown and who has answered.
        statuses: the HTTP status of each exception that `study` raises on purpose; their messages are for raters.
    """
    app = FastAPI(title="codmd study", docs_url=None, redoc_url=None, openapi_url=None)
    page = PAGE.read_text(encoding="utf-8")
    for kind, status in statuses.items():
        app.add_exception_handler(kind, _refusal(status))
    app.add_exception_handler(RequestValidationError, _on_invalid)

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Any]) -> Response:
        length = request.headers.get("content-length", "")
        if request.method == "POST" and (not length.isdecimal() or int(length) > MAX_BODY_BYTES):
            return _error(413, f"a request has at most {MAX_BODY_BYTES} bytes")
        response: Response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    # Functions without async run in threads: flushing the log does not hold up the videos of others.
    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse)
    def show_page() -> str:
        return page

    @app.get("/api/study")
    def about() -> dict[str, Any]:
        return study.about()

    @app.post("/api/raters", status_code=201)
    def enrol(body: Enrolment) -> dict[str, str]:
        return {"rater": study.enrol(is_automated=body.is_automated)}

    @app.get("/api/raters/{rater}")
    def state(rater: str) -> dict[str, Any]:
        return study.state(rater)

    @app.post("/api/raters/{rater}/answers")
    def answer(rater: str, body: Answers) -> dict[str, Any]:
        return study.answer(rater, body.trial, dict(body.answers), body.plays, body.note)

    @app.api_route("/v/{token}.mp4", methods=["GET", "HEAD"], response_class=FileResponse)
    def video(token: str) -> FileResponse:
        path = study.video(token)
        headers = {"etag": f'"{token}"', "last-modified": VIDEO_DATE, "cache-control": "private, max-age=86400"}
        return FileResponse(path, media_type="video/mp4", headers=headers)

    return app


def _refusal(status: int) -> Callable[[Request, Exception], Response]:
    def answer(_: Request, error: Exception) -> Response:
        return _error(status, str(error))

    return answer


def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"][1:])
    return _error(422, f"{where}: {problem['msg']}" if where else str(problem["msg"]))


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)
