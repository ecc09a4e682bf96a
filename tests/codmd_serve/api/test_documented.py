"""The OpenAPI document tells the truth: headers and bodies that are sent are those it names."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from codmd_serve.api import wire
from codmd_serve.api.schemas import JobBody

BODY = {"prompt": "a red circle", "seed": 7}
# Of every answer, by the server's framework or by HTTP itself.
COMMON = {"content-type", "content-length", "date", "server", "vary"}


@pytest.fixture
def done(client: TestClient) -> str:
    """A finished job."""
    answer = client.post("/generate", json=BODY)
    assert answer.status_code == 200
    return str(answer.headers["content-location"].rpartition("/")[2])


def documented(client: TestClient, method: str, path: str, status: int) -> set[str]:
    answers = client.get("/openapi.json").json()["paths"][path][method]["responses"]
    return {name.lower() for name in answers[str(status)].get("headers", {})}


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("post", "/generate", {}, 200),
        ("post", "/generate", {"Prefer": "respond-async"}, 202),
        ("post", "/v1/videos/sync", {}, 200),
        ("get", "/jobs/{job_id}/video", {}, 200),
        ("get", "/jobs/{job_id}/video", {"Range": "bytes=0-3"}, 206),
        ("get", "/v1/videos/{job_id}/content", {}, 200),
    ],
)
def test_headers_of_an_answer_are_documented(
    client: TestClient, done: str, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    more: dict[str, Any] = {"json": BODY} if method == "post" else {}
    answer = client.request(method, path.format(job_id=done), headers=headers, **more)
    assert answer.status_code == status
    sent = {name.lower() for name in answer.headers} - COMMON
    known = documented(client, method, path, status)
    assert sent <= known
    assert known - sent <= {"warnings", "content-length"}, "what is documented is sent"


def test_a_full_queue_says_when_to_come_back_as_documented(client: TestClient) -> None:
    for status in ("429", "503", "507"):
        answers = client.get("/openapi.json").json()["paths"]["/generate"]["post"]["responses"]
        assert "Retry-After" in answers[status]["headers"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/jobs/{job_id}", JobBody),
        ("/v1/videos/{job_id}", wire.VideoObject),
        ("/v1/videos", wire.VideoPage),
        ("/v1/models", wire.ModelPage),
        ("/v1/models/fake", wire.ModelCard),
    ],
)
def test_bodies_have_the_fields_that_are_documented(client: TestClient, done: str, path: str, kind: type) -> None:
    body = client.get(path.format(job_id=done)).json()
    assert TypeAdapter(kind).validate_python(body).model_dump() == body


def test_a_deleted_video_is_described_as_documented(client: TestClient, done: str) -> None:
    body = client.delete(f"/v1/videos/{done}").json()
    assert wire.DeletedVideo.model_validate(body).model_dump() == body
