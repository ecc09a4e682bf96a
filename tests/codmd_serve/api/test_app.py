"""The routes around POST /generate, and what every answer has in common, with and without the page."""

import ast
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runner import FACTS
from fastapi.testclient import TestClient
from http_tests import begin, post, refusal, until

from codmd_serve.api.backend import Own
from codmd_serve.api.errors import CODE_OF_STATUS, CODES, STATUS_OF_CODE
from codmd_serve.api.schemas import GenerateBody
from codmd_serve.jobs.store import JobStore

Serve = Callable[..., AbstractContextManager[TestClient]]


def test_health_and_ready_tell_the_model_once_it_is_warm(client: TestClient) -> None:
    for path in ("/health", "/ready"):
        answer = client.get(path)
        assert answer.status_code == 200
        body = answer.json()
        assert body["status"] == "ok" and body["is_ready"] is True and body["reason"] == ""
        assert body["model"]["name"] == "fake" and body["model"]["num_steps"] == 4
        assert (body["num_waiting"], body["is_running"], body["num_worker_restarts"]) == (0, False, 0)


def test_health_says_what_a_worker_fell_back_to(serve: Serve) -> None:
    said = "blocks not compiled: RuntimeError: no compiler found; VAE norms unfused: no package triton"
    facts = replace(FACTS, fallback=said)
    with serve(own=Own("b" * 64, "fake", "e" * 64, facts)) as client:
        client.runner.facts = facts  # type: ignore[attr-defined]
        model = client.get("/health").json()["model"]
        assert model["fallback"] == said and model["execution"] == "eager"
        assert 'fallback="true"' in client.get("/metrics").text


def test_health_is_200_and_ready_503_while_there_is_no_model(serve: Serve) -> None:
    with serve(is_ready=False) as client:
        assert client.get("/health").json()["model"] is None
        ready = client.get("/ready")
        assert ready.status_code == 503 and ready.json()["is_ready"] is False
        assert ready.json()["reason"] == "the model is loading"


def test_ready_says_why_while_no_worker_is_alive(client: Any) -> None:
    client.runner.is_ready = False
    assert client.get("/ready").json()["reason"] == "no worker is alive"
    client.runner.load_error = "the worker cannot be restarted: no memory"
    assert client.get("/ready").json()["reason"] == "the worker cannot be restarted: no memory"


def test_ready_is_503_while_one_worker_hangs_and_another_is_well(client: Any) -> None:
    client.runner.num_hanging = 1
    ready = client.get("/ready")
    assert ready.status_code == 503 and ready.json()["reason"] == "a worker hangs and is about to be replaced"
    assert client.get("/health").status_code == 200 and post(client, "a").status_code == 200
    client.runner.num_hanging = 0
    assert client.get("/ready").status_code == 200


def test_results_that_cannot_be_kept_close_ready_and_keep_the_queue(serve: Serve, tmp_path: Path) -> None:
    place = tmp_path / "results"
    place.touch()
    with serve(results=str(place)) as client:
        ready = client.get("/ready")
        assert ready.status_code == 503 and "the results place cannot be used" in ready.json()["reason"]
        assert str(tmp_path) not in ready.text
        job_id = begin(client, "a")
        place.unlink()
        until(lambda: client.get(f"/jobs/{job_id}").json()["status"] == "completed")
        assert client.get("/ready").status_code == 200


def test_head_is_answered_wherever_get_is(client: TestClient) -> None:
    location = post(client, "a").headers["content-location"]
    for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json", "/jobs", location, "/v1/models"):
        get, head = client.get(path), client.head(path)
        assert head.status_code == get.status_code == 200, path
        assert head.content == b"" and head.headers["content-type"] == get.headers["content-type"]
    assert client.head("/generate").status_code == 405 and client.head("/nowhere").status_code == 404


def test_docs_describe_the_body_with_examples_and_every_refusal(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    operation = schema["paths"]["/generate"]["post"]
    wanted = {"200", "202", "401", "409", "413", "422", "429", "500", "503", "507"}
    assert set(operation["responses"]) == wanted
    assert set(operation["responses"]["200"]["headers"]) >= {"Content-Location", "X-Seed", "Server-Timing", "Warnings"}
    assert list(operation["responses"]["200"]["content"]) == ["video/mp4", "image/gif", "image/webp"]
    assert operation["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
    assert {each["name"] for each in operation["parameters"]} == {"Prefer", "Idempotency-Key", "Cache-Control"}
    body = schema["components"]["schemas"]["GenerateBody"]
    assert set(body["properties"]) == set(GenerateBody.model_fields) and body["required"] == ["prompt"]
    assert body["additionalProperties"] is False and body["examples"]
    assert all(f"`{code}`" in schema["info"]["description"] for code in CODES)


def test_docs_load_nothing_from_elsewhere(client: TestClient) -> None:
    text = client.get("/docs").text
    assert "openapi.json" in text and "http://" not in text and "https://" not in text and "//" not in text


def test_every_code_is_described() -> None:
    assert set(CODE_OF_STATUS.values()) | set(STATUS_OF_CODE) <= set(CODES)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("PUT", "/jobs/x", 405, "method_not_allowed"),
        ("POST", "/gradio_api/upload", 404, "not_found"),
    ],
)
def test_every_refusal_has_the_same_shape(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    refusal(client.request(method, path), status, code)


def test_a_bug_is_a_500_without_its_traceback(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(JobStore, "submit", broken)
    message = refusal(post(client, "a"), 500, "internal_error")
    assert message == "internal error; the server's log has the details"


def test_a_store_that_fails_is_a_503_that_names_no_path(serve: Serve, tmp_path: Path) -> None:
    with serve() as client:
        store = tmp_path / "data" / "jobs.sqlite3"
        client.backend.store.database.close()  # type: ignore[attr-defined]
        for path in store.parent.glob("jobs.sqlite3*"):
            path.unlink()
        store.mkdir()
        answer = post(client, "a")
        assert str(tmp_path) not in refusal(answer, 503, "store_unavailable") and answer.headers["retry-after"] == "5"
        until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200


def test_a_full_disk_is_507_and_keeps_the_queue(client: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    running = begin(client, f"wait {gate}")
    failing, waiting = begin(client, "full"), begin(client, "good")
    check = client.backend.results.check
    client.backend.results.check = lambda: (_ for _ in ()).throw(_full())
    gate.touch()
    until(lambda: client.get(f"/jobs/{failing}").json()["status"] == "failed")
    assert client.get(f"/jobs/{failing}").json()["error"]["code"] == "storage_full"
    assert client.get(f"/jobs/{running}").json()["status"] == "completed"
    refusal(post(client, "b"), 507, "storage_full")
    assert client.get("/ready").json()["reason"] == "the server's disk is full"
    assert client.get(f"/jobs/{waiting}").json()["status"] == "queued"
    client.backend.results.check = check
    until(lambda: client.get(f"/jobs/{waiting}").json()["status"] == "completed")
    assert client.get("/ready").status_code == 200


def _full() -> Exception:
    from codmd_serve.errors import StorageFullError

    return StorageFullError("there is no room for more videos")


def test_a_client_that_waits_for_a_job_without_room_gets_507(client: Any) -> None:
    refusal(post(client, "full"), 507, "storage_full")


def test_other_sites_may_not_read_answers(client: TestClient) -> None:
    answer = client.get("/health", headers={"origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_prompts_are_not_logged(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert post(client, "a private matter", seed=99).status_code == 200
    assert "private" not in caplog.text
    (line,) = [each.getMessage() for each in caplog.records if each.name == "codmd_serve.dispatcher"]
    assert "status=completed shape=64x64x17 seed=99" in line and "denoise_ms=20" in line


def test_metrics_count_jobs_and_hold_no_prompt(client: TestClient) -> None:
    post(client, "a private matter", seed=1)
    post(client, "a private matter", seed=1)
    post(client, "oom")
    text = client.get("/metrics").text
    for line in (
        'codmd_jobs_total{code="",status="completed"} 1.0',
        'codmd_jobs_total{code="out_of_memory",status="failed"} 1.0',
        'codmd_submissions_total{source="store"} 1.0',
        'codmd_stage_seconds_count{stage="denoise"} 1.0',
        "codmd_job_seconds_count 1.0",
        "codmd_job_peak_memory_bytes 1.31072e+07",
        "codmd_ready 1.0",
        "codmd_workers 1.0",
    ):
        assert line in text, line
    assert "private" not in text and 'codmd_execution_info{attention="none"' in text


# draining


def test_draining_answers_everybody_with_json(serve: Serve, tmp_path: Path) -> None:
    """S6: what runs ends, what waits stays in the store and its client is told so."""
    from concurrent.futures import ThreadPoolExecutor

    gate = tmp_path / "gate"
    with serve() as client, ThreadPoolExecutor() as pool:
        running = pool.submit(post, client, f"wait {gate}")
        until(lambda: client.get("/jobs").json()["jobs"])
        waiting = pool.submit(post, client, "b")
        until(lambda: len(client.get("/jobs").json()["jobs"]) == 2)
        draining = pool.submit(client.portal.call, client.backend.drain, 60.0)  # type: ignore[union-attr, attr-defined]
        answer = waiting.result(60)
        assert "goes on when it is back" in refusal(answer, 503, "shutting_down")
        ready = client.get("/ready")
        assert ready.status_code == 503 and ready.json()["reason"] == "the server is shutting down"
        refused = post(client, "c")
        refusal(refused, 503, "shutting_down")
        assert refused.headers["retry-after"] == "10"
        gate.touch()
        assert running.result(60).status_code == 200
        draining.result(60)
        job = client.get(answer.headers["content-location"]).json()
        assert job["status"] == "queued" and job["attempts"] == 0
    with serve() as client:
        until(lambda: client.get(answer.headers["content-location"]).json()["status"] == "completed")


def test_a_job_that_outlives_the_drain_goes_on_after_the_restart(serve: Serve, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    gate = tmp_path / "gate"
    with serve() as client, ThreadPoolExecutor() as pool:
        waiting = pool.submit(post, client, f"wait {gate}", seed=4)
        until(lambda: client.runner.ran)  # type: ignore[attr-defined]
        client.portal.call(client.backend.drain, 0.05)  # type: ignore[union-attr, attr-defined]
        answer = waiting.result(60)
        refusal(answer, 503, "shutting_down")
    gate.touch()
    with serve() as client:
        location = answer.headers["content-location"]
        until(lambda: client.get(location).json()["status"] == "completed")
        assert client.get(location).json()["attempts"] == 1, "the first try was the server's fault"


def test_the_manual_lists_every_code() -> None:
    text = (Path(__file__).parents[3] / "docs" / "reference" / "errors.md").read_text()
    for code, meaning in CODES.items():
        status, _, words = meaning.partition(": ")
        assert f"| `{code}` | {status} | {words} |" in text, code


def test_every_code_that_a_job_can_end_with_is_listed() -> None:
    """The second word of GenerationError and the first of JobFailed, wherever the package makes one."""
    place = {"GenerationError": 1, "JobFailed": 0}
    codes = set()
    for path in (Path(__file__).parents[3] / "codmd_serve").rglob("*.py"):
        if "bench" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in place:
                words = node.args[place[node.func.id] :][:1]
                codes |= {word.value for word in words if isinstance(word, ast.Constant)}
    codes -= {"warm_up"}  # while it loads: that is worker_fatal
    assert len(codes) > 10 and codes <= CODES.keys(), codes - CODES.keys()
