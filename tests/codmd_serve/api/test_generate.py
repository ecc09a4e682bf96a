"""POST /generate and GET /jobs/{id} over HTTP: the video and its headers, every refusal, and clients that leave."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from codmd_serve.api.app import create_app
from codmd_serve.config import ServeConfig
from codmd_serve.dispatcher import Dispatcher, Job

Serve = Callable[..., AbstractContextManager[TestClient]]
DEADLINE_S = 120.0


def post(client: TestClient, prompt: str, **body: Any) -> Any:
    return client.post("/generate", json={"prompt": prompt, **body})


def jobs_of(client: TestClient) -> list[Job]:
    dispatcher: Dispatcher = client.app.state.dispatcher  # type: ignore[attr-defined]
    return list(dispatcher._jobs.values())


def until(is_true: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.002)


def test_generate_answers_the_video_and_says_how_it_was_made(client: TestClient) -> None:
    answer = post(client, "a red circle", seed=7, num_frames=5)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "video/mp4"
    made = json.loads(answer.content.removeprefix(b"mp4 "))
    assert made == {
        "prompt": "a red circle",
        "seed": 7,
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "fps": 16,
        "crf": 18,
    }
    assert answer.headers["x-seed"] == "7"
    assert answer.headers["content-disposition"] == 'inline; filename="codmd-7.mp4"'
    queue, *stages = answer.headers["server-timing"].split(", ")
    assert queue.startswith("queue;dur=") and float(queue.partition("=")[2]) >= 0
    assert stages == ["text;dur=1.0", "denoise;dur=20.2", "decode;dur=3.0", "encode;dur=4.0"]
    assert "warnings" not in answer.headers


def test_the_video_leaves_no_file_behind(client: TestClient) -> None:
    post(client, "a")
    assert not list(jobs_of(client)[0].path.parent.iterdir())


def test_a_seed_that_was_drawn_is_told_and_makes_the_same_video_again(client: TestClient) -> None:
    first = post(client, "a")
    again = post(client, "a", seed=int(first.headers["x-seed"]))
    assert again.content == first.content
    assert again.headers["content-location"] != first.headers["content-location"]


def test_content_location_leads_to_the_job(client: TestClient) -> None:
    answer = post(client, "a NEW word", seed=3)
    job = client.get(answer.headers["content-location"]).json()
    assert job["status"] == "completed" and job["progress"] == 1.0 and job["seed"] == 3
    assert job["params"]["prompt"] == "a NEW word" and job["warnings"] == ["NEW"]
    assert set(job["timings_ms"]) == {"queue", "text", "denoise", "decode", "encode"}
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert job["error"] is None and "path" not in job


def test_a_job_never_seen_is_not_found(client: TestClient) -> None:
    answer = client.get("/jobs/nowhere")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


def test_warnings_are_a_header_that_no_prompt_can_break_out_of(client: TestClient) -> None:
    answer = post(client, "DRAG\u00d3N \u4e16 \U0001f409X \\N LAST")
    assert answer.headers["warnings"] == "DRAG\\xd3N; \\U0001f409X; \\\\N; LAST"
    assert len(post(client, "WORD" * 900).headers["warnings"]) == 1000


def refusal(answer: Any, status: int, code: str) -> str:
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and error["code"] == code
    message: str = error["message"]
    assert "\n" not in message and len(message) < 300
    return message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": "   "}, "prompt: must not be blank"),
        ({"prompt": "x" * 5000}, "prompt: String should have at most 4000 characters"),
        ({"prompt": "a", "num_frames": 10**9}, "num_frames must be 4k + 1, and at 64x64 up to 65, got 1000000000; 65"),
        ({"prompt": "a", "height": 60}, "height must be a multiple of 16 up to 1024, got 60; 64 would be accepted"),
        ({"prompt": "a", "sed": 7}, "unknown field 'sed'; the fields are in /docs"),
        ({"prompt": "a", "y" * 500: 7}, "unknown field 'yyy"),
        ({"prompt": "a", "\ud800": 7}, "send a JSON object"),
        ({"prompt": "a", "seed": "7"}, "seed: Input should be a valid integer"),
        ({"prompt": "a", "guidance_scale": "much"}, "guidance_scale: Input should be a valid"),
        ({"prompt": "a", "guidance_scale": 5}, "this is a distilled student, which has the teacher's guidance"),
        ([], "send a JSON object with at least a prompt, and the header content-type: application/json"),
        ("a red circle", "send a JSON object with at least a prompt"),
        (None, "send a JSON object with at least a prompt"),
    ],
)
def test_bad_bodies_are_refused_in_one_sentence(client: TestClient, body: Any, message: str) -> None:
    text = json.dumps(body)
    answer = client.post("/generate", content=text, headers={"content-type": "application/json"})
    assert refusal(answer, 422, "invalid_request").startswith(message)
    assert not jobs_of(client), "nothing reached the queue"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "send a JSON object"),
        (b"{", "the body is not JSON: Expecting property name"),
        (b"prompt=a", "the body is not JSON: Expecting value"),
        (b'{"prompt": "\xff"}', "the body cannot be read as JSON"),
        (b"[" * 50_000, "the body cannot be read as JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "the body cannot be read as JSON"),
    ],
)
def test_bodies_that_are_no_json_are_refused(client: TestClient, content: bytes, message: str) -> None:
    answer = client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert refusal(answer, 422, "invalid_request").startswith(message)


def test_a_body_without_its_content_type_is_refused_with_what_to_do(client: TestClient) -> None:
    answer = client.post("/generate", content=b'{"prompt": "a"}')
    assert "the header content-type: application/json" in refusal(answer, 422, "invalid_request")


def test_the_offending_field_is_named(client: TestClient) -> None:
    assert post(client, "a", height=60).json()["error"]["field"] == "height"
    assert post(client, "").json()["error"]["field"] == "prompt"


def test_a_body_past_the_bound_is_not_read(serve: Serve) -> None:
    with serve(max_body_bytes=2000) as client:
        assert "larger than 2000 bytes" in refusal(post(client, "x" * 3000), 413, "body_too_large")
        assert post(client, "a").status_code == 200


@pytest.mark.parametrize(("prompt", "code"), [("oom", "out_of_memory"), ("bug", "internal_error")])
def test_a_failure_is_a_500_with_its_code_and_the_server_goes_on(client: TestClient, prompt: str, code: str) -> None:
    answer = post(client, prompt)
    assert "secret" not in refusal(answer, 500, code)
    job = jobs_of(client)[0]
    assert client.get(f"/jobs/{job.id}").json()["error"]["code"] == code
    assert post(client, "good").status_code == 200


def test_a_full_queue_answers_429_with_retry_after(serve: Serve, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with serve(queue_size=1) as client, ThreadPoolExecutor() as pool:
        running = pool.submit(post, client, f"wait {gate}")
        until(lambda: [job.status for job in jobs_of(client)] == ["running"])
        waiting = pool.submit(post, client, "b")
        until(lambda: len(jobs_of(client)) == 2)
        refused = post(client, "c")
        assert "1 jobs are waiting" in refusal(refused, 429, "queue_full")
        assert refused.headers["retry-after"] == "5", "two jobs of 2.5 seconds"
        gate.touch()
        assert running.result(DEADLINE_S).status_code == waiting.result(DEADLINE_S).status_code == 200
        assert float(waiting.result().headers["server-timing"].split(";dur=")[1].split(",")[0]) > 0


def test_a_killed_worker_costs_a_try_and_not_the_request(client: TestClient, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(post, client, f"wait {gate}", seed=5)
        until(lambda: jobs_of(client) and jobs_of(client)[0].stage == "denoise")
        first_worker = int((tmp_path / "starts").read_text().split()[0])
        os.kill(first_worker, signal.SIGKILL)
        until(lambda: jobs_of(client)[0].attempts == 2)
        gate.touch()
        answer = running.result(DEADLINE_S)
    assert answer.status_code == 200 and answer.headers["x-seed"] == "5"
    assert client.get("/health").json()["num_worker_restarts"] == 1


def test_a_request_that_kills_its_worker_every_time_fails_and_the_server_goes_on(client: TestClient) -> None:
    assert "the worker died 2 times on this job" in refusal(post(client, "die"), 500, "worker_died")
    assert post(client, "good").status_code == 200


def test_requests_wait_for_the_next_worker(client: TestClient, tmp_path: Path) -> None:
    os.kill(int((tmp_path / "starts").read_text().split()[0]), signal.SIGKILL)
    until(lambda: client.get("/ready").status_code == 503)
    assert post(client, "a").status_code == 200


def test_before_the_model_is_loaded_requests_are_refused(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "fatal").touch()
    with serve(is_ready=False) as client:
        answer = post(client, "a")
        assert refusal(answer, 503, "not_ready") == "the model is not loaded yet"
        assert answer.headers["retry-after"] == "5"
        assert client.get("/health").status_code == 200


def test_a_client_that_leaves_cancels_its_job(tmp_path: Path, fake_worker: tuple[str, ...]) -> None:
    """Straight to the application: what a connection that closes looks like to it."""
    dispatcher = Dispatcher(ServeConfig(bundle=str(tmp_path)), fake_worker)
    app = create_app(dispatcher)
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": headers}

    async def story() -> tuple[Job, list[Any]]:
        sent: list[Any] = []
        left = asyncio.Event()
        body = iter([{"type": "http.request", "body": b'{"prompt": "wait /nowhere/at/all"}'}])

        async def receive() -> Any:
            if (message := next(body, None)) is not None:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        async with app.router.lifespan_context(app), asyncio.timeout(DEADLINE_S):
            while not dispatcher.is_ready:
                await asyncio.sleep(0.002)
            request = asyncio.create_task(app(scope, receive, send))
            while not (dispatcher.running and dispatcher.running.stage == "denoise"):
                await asyncio.sleep(0.002)
            job = dispatcher.running
            left.set()
            await request
            await job.finished.wait()
        return job, sent

    job, sent = asyncio.run(story())
    assert job.status == "cancelled" and job.attempts == 1
    assert sent[0]["status"] == 499, "and not 500, which would be logged as a bug"
