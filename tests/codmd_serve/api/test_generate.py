"""POST /generate over HTTP: the video and its headers, waiting or not, every refusal, and clients that leave."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runner import FACTS
from fastapi.testclient import TestClient
from http_tests import DEADLINE_S, begin, job_of, post, refusal, status_is, until

from codmd_serve.api.backend import Own
from codmd_serve.api.generate import parse_prefer

Serve = Callable[..., AbstractContextManager[TestClient]]


def jobs_of(client: Any) -> list[Any]:
    found: list[Any] = client.get("/jobs", params={"limit": 100}).json()["jobs"]
    return found


def test_generate_answers_the_video_and_says_how_it_was_made(client: TestClient) -> None:
    answer = post(client, "a red circle", seed=7, num_frames=5)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "video/mp4"
    made = json.loads(answer.content.removeprefix(b"mp4 "))
    wanted = {"prompt": "a red circle", "seed": 7, "height": 64, "width": 64, "num_frames": 5, "fps": 16, "crf": 18}
    assert made.items() >= wanted.items()
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["x-seed"] == "7"
    assert answer.headers["content-disposition"] == 'inline; filename="codmd-7.mp4"'
    queue, *stages = answer.headers["server-timing"].split(", ")
    assert queue.startswith("queue;dur=") and float(queue.partition("=")[2]) >= 0
    assert stages == ["text;dur=1.0", "denoise;dur=20.2", "decode;dur=3.0", "encode;dur=4.0"]
    assert "warnings" not in answer.headers and answer.headers["cache-control"] == "no-store"


def test_the_spool_is_empty_after_a_video(client: Any) -> None:
    post(client, "a")
    spool = client.backend.dispatcher.ownership.spool
    until(lambda: not list(spool.iterdir()))


def test_a_seed_that_was_drawn_is_told_and_makes_the_same_video_again(client: TestClient) -> None:
    first = post(client, "a")
    again = post(client, "a", seed=int(first.headers["x-seed"]))
    assert again.content == first.content
    assert again.headers["content-location"] != first.headers["content-location"]


def test_quality_picks_the_engine_and_its_videos_are_kept_apart(serve: Serve) -> None:
    with serve() as client:
        client.runner.facts = replace(FACTS, lossy_beside="fp8")  # type: ignore[attr-defined]
        assert client.get("/health").json()["model"]["lossy_beside"] == "fp8"
        assert client.get("/v1/models").json()["data"][0]["lossy"] == "fp8"
        plain = post(client, "a", seed=1)
        lossy = post(client, "a", seed=1, quality="high")
        assert json.loads(plain.content[4:])["may_be_lossy"] is False
        assert json.loads(lossy.content[4:])["may_be_lossy"] is True
        ran = list(client.runner.ran)  # type: ignore[attr-defined]
        assert post(client, "a", seed=1, quality="lossless").content == plain.content
        assert post(client, "a", seed=1, quality="high").content == lossy.content
        assert client.runner.ran == ran  # type: ignore[attr-defined]  # both were there already


def test_a_video_of_another_precision_is_not_taken_for_this_one(serve: Serve) -> None:
    with serve() as client:
        runner: Any = client.runner  # type: ignore[attr-defined]
        post(client, "a", seed=1)
        runner.facts = replace(FACTS, dtype="bfloat16")
        post(client, "a", seed=1)
        post(client, "a", seed=1)
        assert runner.ran == ["a", "a"]
        runner.facts = FACTS
        post(client, "a", seed=1)
        assert runner.ran == ["a", "a"]


def test_lossless_is_refused_where_nothing_is(serve: Serve) -> None:
    with serve() as client:
        client.runner.facts = replace(FACTS, lossy="fp8")  # type: ignore[attr-defined]
        answer = post(client, "a", quality="lossless")
        assert "high, medium, low would be accepted" in refusal(answer, 422, "invalid_request")
        assert answer.json()["error"]["field"] == "quality"


def test_content_location_leads_to_the_job(client: TestClient) -> None:
    answer = post(client, "a NEW word", seed=3)
    job = client.get(answer.headers["content-location"]).json()
    assert job["status"] == "completed" and job["progress"] == 1.0 and job["seed"] == 3
    assert job["params"]["prompt"] == "a NEW word" and job["warnings"] == ["NEW"]
    assert set(job["timings_ms"]) == {"queue", "text", "denoise", "decode", "encode"}
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] < job["expires_at"]
    assert job["finished_at"].endswith("Z") and job["attempts"] == 1 and job["model"] == "fake"
    assert job["inference_time_s"] == pytest.approx(0.02825, abs=1e-4) and job["peak_memory_mb"] == 12.5
    assert job["error"] is None and "path" not in str(job) and "result" not in job


def test_warnings_are_a_header_that_no_prompt_can_break_out_of(client: TestClient) -> None:
    answer = post(client, "DRAG\u00d3N \u4e16 \U0001f409X \\N LAST")
    assert answer.headers["warnings"] == "DRAG\\xd3N; \\U0001f409X; \\\\N; LAST"
    assert len(post(client, "WORD" * 900).headers["warnings"]) == 1000


# reuse


def test_an_equal_request_is_answered_from_the_store(client: Any) -> None:
    first, again = post(client, "a", seed=1), post(client, "a", seed=1)
    assert again.content == first.content and client.runner.ran == ["a"]
    assert again.headers["server-timing"].startswith("queue;dur=0.0, text;dur=0.0")
    fresh = post(client, "a", {"Cache-Control": "no-cache"}, seed=1)
    assert fresh.content == first.content and client.runner.ran == ["a", "a"]
    assert post(client, "a", seed=1, crf=30).status_code == 200 and client.runner.ran == ["a"] * 3


# waiting or not


def test_respond_async_answers_the_job_at_once(client: TestClient, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    answer = post(client, f"wait {gate}", {"Prefer": "respond-async"})
    assert answer.status_code == 202 and answer.headers["preference-applied"] == "respond-async"
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}" and job["status"] in ("queued", "running")
    gate.touch()
    assert status_is(client, job["id"], "completed")["progress"] == 1.0


def test_wait_answers_the_job_when_the_time_is_over_and_the_video_before(client: TestClient, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    answer = post(client, f"wait {gate}", {"Prefer": "wait=0"})
    assert answer.status_code == 202
    late = post(client, "b", {"Prefer": "wait=1, handling=lenient"})
    assert late.status_code == 202 and late.headers["preference-applied"] == "wait=1.0"
    gate.touch()
    for each in (answer, late):
        status_is(client, each.json()["id"], "completed")
    assert post(client, "c", {"Prefer": "wait=100"}).status_code == 200


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", (False, None)),
        ("respond-async", (True, None)),
        ("Respond-Async, wait=10", (False, 10.0)),
        ("respond-async, wait=0", (True, None)),
        ("wait = 5", (False, 5.0)),
        ('wait="5"', (False, 5.0)),
        ("wait=999999999", (False, 86_400.0)),
        ("wait=-1, wait=x, waiter=3", (False, None)),
    ],
)
def test_prefer_is_read_as_in_its_rfc(text: str, wanted: tuple[bool, float | None]) -> None:
    assert parse_prefer({"prefer": text}) == wanted


# idempotency


def test_the_same_key_and_body_is_the_same_job(client: Any) -> None:
    key = {"Idempotency-Key": "k1"}
    first, again = post(client, "a", key), post(client, "a", key)
    assert again.status_code == 200 and again.content == first.content
    assert again.headers["content-location"] == first.headers["content-location"]
    assert again.headers["x-seed"] == first.headers["x-seed"], "the seed that was drawn first"
    assert client.runner.ran == ["a"]
    refusal(post(client, "b", key), 409, "idempotency_conflict")
    refusal(post(client, "a", {"Idempotency-Key": "a key"}), 422, "invalid_request")


def test_a_replay_waits_for_the_running_job(client: Any, tmp_path: Path) -> None:
    gate, key = tmp_path / "gate", {"Idempotency-Key": "k"}
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(post, client, f"wait {gate}", key) for _ in range(2)]
        until(lambda: len(client.runner.ran) == 1 and jobs_of(client)[0]["status"] == "running")
        gate.touch()
        answers = [each.result(DEADLINE_S) for each in both]
    assert [answer.status_code for answer in answers] == [200, 200] and len(client.runner.ran) == 1
    assert answers[0].headers["content-location"] == answers[1].headers["content-location"]


# refusals


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": "   "}, "prompt: must not be blank"),
        ({"prompt": "&nbsp;&amp;nbsp;"}, "prompt: must not be blank"),
        ({"prompt": "x" * 5000}, "prompt: String should have at most 4000 characters"),
        ({"prompt": "a", "num_frames": 10**9}, "num_frames must be 4k + 1, and at 64x64 up to 65, got 1000000000; 65"),
        ({"prompt": "a", "height": 60}, "height must be a multiple of 16 up to 1024, got 60; 64 would be accepted"),
        ({"prompt": "a", "sed": 7}, "unknown field 'sed'; the fields are in /docs"),
        ({"prompt": "a", "y" * 500: 7}, "unknown field 'yyy"),
        ({"prompt": "a", "\ud800": 7}, "send a JSON object"),
        ({"prompt": "a", "seed": "7"}, "seed: Input should be a valid integer"),
        ({"prompt": "a", "guidance_scale": "much"}, "guidance_scale: Input should be a valid"),
        ({"prompt": "a", "guidance_scale": 5}, "this is a distilled student, which has the teacher's guidance"),
        ({"prompt": "a", "model": "sora-2"}, "model must be one of fake, got 'sora-2'"),
        ({"prompt": "a", "webhook_url": "https://h.example/"}, "this server calls no webhooks"),
        ({"prompt": "a", "preview": 1}, "preview: Input should be a valid boolean"),
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


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [("oom", 500, "out_of_memory"), ("bug", 500, "internal_error"), ("die", 500, "worker_died")],
)
def test_a_failure_has_its_code_and_the_server_goes_on(client: TestClient, prompt: str, status: int, code: str) -> None:
    assert "secret" not in refusal(post(client, prompt), status, code)
    job = jobs_of(client)[0]
    assert job["status"] == "failed" and job["error"]["code"] == code
    assert job["attempts"] == (2 if prompt == "die" else 1)
    assert post(client, "good").status_code == 200


def test_a_full_queue_answers_429_with_the_time_until_a_place_frees(serve: Serve, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with serve(queue_size=1) as client:
        running = begin(client, f"wait {gate}")
        status_is(client, running, "running")
        waiting = begin(client, "b")
        refused = post(client, "c")
        assert "1 jobs are waiting" in refusal(refused, 429, "queue_full")
        assert refused.headers["retry-after"] == "3", "one job of 2.5 seconds, not all of them"
        gate.touch()
        assert status_is(client, waiting, "completed")["timings_ms"]["queue"] > 0


def test_a_worker_that_dies_costs_a_try_and_not_the_request(client: TestClient, tmp_path: Path) -> None:
    answer = post(client, f"die-once {tmp_path / 'died'}", seed=5)
    assert answer.status_code == 200 and answer.headers["x-seed"] == "5"
    assert client.get(answer.headers["content-location"]).json()["attempts"] == 2


def test_jobs_are_taken_while_the_model_loads(serve: Serve) -> None:
    with serve(is_ready=False) as client:
        assert client.get("/ready").status_code == 503
        job = job_of(client, begin(client, "a"))
        assert job["status"] in ("queued", "running", "completed")


def test_before_anything_is_known_of_the_model_requests_are_refused(serve: Serve) -> None:
    with serve(is_ready=False, own=Own("b" * 64, "fake", "e" * 64, None)) as client:
        answer = post(client, "a")
        assert "not loaded yet" in refusal(answer, 503, "not_ready") and answer.headers["retry-after"] == "5"


# clients that leave


def leave(client: Any, body: dict[str, Any], when: Callable[[], bool], headers: list[Any] | None = None) -> list[Any]:
    """Send a request and go away when `when` says so; what the server sent."""
    app = client.app
    said = [(b"content-type", b"application/json"), (b"host", b"localhost"), *(headers or [])]
    scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": said, "app": app}

    async def story() -> list[Any]:
        sent: list[Any] = []
        parts = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

        async def receive() -> Any:
            if (message := next(parts, None)) is not None:
                return message
            async with asyncio.timeout(DEADLINE_S):
                while not await asyncio.to_thread(when):
                    await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent

    found: list[Any] = client.portal.call(story)
    return found


def test_a_client_that_leaves_cancels_its_job(client: Any) -> None:
    sent = leave(client, {"prompt": "wait /dev/null/never"}, lambda: bool(client.runner.ran))
    assert sent[0]["status"] == 499, "and not 500, which would be logged as a bug"
    (job,) = jobs_of(client)
    assert status_is(client, job["id"], "cancelled")["error"]["code"] == "cancelled"
    assert post(client, "next").status_code == 200


def test_a_client_that_leaves_does_not_cancel_what_another_waits_for(client: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    key = [(b"idempotency-key", b"k")]
    with ThreadPoolExecutor() as pool:
        other = pool.submit(post, client, f"wait {gate}", {"Idempotency-Key": "k"})
        until(lambda: client.runner.ran)
        leave(client, {"prompt": f"wait {gate}"}, lambda: True, key)
        gate.touch()
        assert other.result(DEADLINE_S).status_code == 200


def test_a_client_that_leaves_does_not_cancel_an_accepted_job(client: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job_id = begin(client, f"wait {gate}", {"Idempotency-Key": "k"})
    # The same key with another preference is still the same job.
    leave(client, {"prompt": f"wait {gate}"}, lambda: True, [(b"idempotency-key", b"k")])
    gate.touch()
    status_is(client, job_id, "completed")
