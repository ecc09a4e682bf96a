"""The routes around POST /generate, and what every answer has in common."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from codmd_serve.api.schemas import GenerateBody
from codmd_serve.dispatcher import Dispatcher

Serve = Callable[..., AbstractContextManager[TestClient]]


def test_health_and_ready_tell_the_model_once_it_is_warm(client: TestClient) -> None:
    for path in ("/health", "/ready"):
        answer = client.get(path)
        assert answer.status_code == 200
        body = answer.json()
        assert body["status"] == "ok" and body["is_ready"] is True
        assert body["model"]["name"] == "fake" and body["model"]["num_steps"] == 4
        assert (body["num_waiting"], body["is_running"], body["num_worker_restarts"]) == (0, False, 0)


def test_health_is_200_and_ready_503_while_there_is_no_model(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "fatal").touch()
    with serve(is_ready=False) as client:
        assert client.get("/health").json()["model"] is None
        ready = client.get("/ready")
        assert ready.status_code == 503 and ready.json()["is_ready"] is False


def test_docs_describe_the_body_with_examples_and_every_refusal(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
    schema = client.get("/openapi.json").json()
    operation = schema["paths"]["/generate"]["post"]
    assert set(operation["responses"]) == {"200", "413", "422", "429", "500", "503"}
    assert set(operation["responses"]["200"]["headers"]) == {"Content-Location", "X-Seed", "Server-Timing", "Warnings"}
    assert list(operation["responses"]["200"]["content"]) == ["video/mp4"]
    assert operation["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
    body = schema["components"]["schemas"]["GenerateBody"]
    assert set(body["properties"]) == set(GenerateBody.model_fields) and body["required"] == ["prompt"]
    assert body["additionalProperties"] is False and body["examples"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
def test_every_refusal_has_the_same_shape(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code and set(answer.json()) == {"error"}


def test_a_bug_is_a_500_without_its_traceback(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(Dispatcher, "submit", broken)
    answer = client.post("/generate", json={"prompt": "a"})
    assert answer.status_code == 500
    assert answer.json() == {
        "error": {"code": "internal_error", "message": "internal error; the server's log has the details"}
    }


def test_other_sites_may_not_read_answers(client: TestClient) -> None:
    answer = client.get("/health", headers={"origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_prompts_are_not_logged(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert client.post("/generate", json={"prompt": "a private matter", "seed": 99}).status_code == 200
    assert "private" not in caplog.text
    (line,) = [record.getMessage() for record in caplog.records if record.name == "codmd_serve.dispatcher"]
    assert "status=completed shape=64x64x17 seed=99" in line and "denoise_ms=20" in line
