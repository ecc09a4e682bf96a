"""The OpenAI-style routes, with the stock client and by hand."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from http_tests import begin, post, refusal, until

from codmd_serve.api.videos import poll_after_ms

Serve = Callable[..., AbstractContextManager[TestClient]]


@contextmanager
def stock_client(client: TestClient) -> Iterator[Any]:
    """The pinned `openai` client, over the test's transport. Every call of its videos is marked deprecated."""
    import openai

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        http = openai.DefaultHttpxClient(transport=_Through(client))
        yield openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


def _transport_base() -> Any:
    import openai._base_client as base

    return getattr(base, "httpx2", None) or getattr(base, "httpx", httpx)


class _Through(_transport_base().BaseTransport):  # type: ignore[misc]
    """Sends the requests of another client through the TestClient."""

    def __init__(self, client: TestClient) -> None:
        self.client = client

    def handle_request(self, request: Any) -> Any:
        answer = self.client.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        headers = {name: value for name, value in answer.headers.items() if name != "content-encoding"}
        return _transport_base().Response(answer.status_code, headers=headers, content=answer.content)


def test_the_stock_client_works_unchanged(client: TestClient, tmp_path: Path) -> None:
    with stock_client(client) as openai:
        video = openai.videos.create(prompt="a red circle", model="fake", size="64x64", seconds="1")
        assert video.id and video.status in ("queued", "in_progress", "completed") and video.object == "video"
        done = openai.videos.create_and_poll(prompt="a red circle", poll_interval_ms=10)
        assert done.status == "completed" and done.progress == 100 and done.model == "fake"
        assert done.seconds == "1.0625" and done.size == "64x64" and done.expires_at > done.created_at
        assert openai.videos.retrieve(done.id).id == done.id
        listed = openai.videos.list(limit=1)
        assert [each.id for each in listed.data] == [done.id] and listed.has_more
        assert [each.id for each in openai.videos.list(order="asc")] == [video.id, done.id]
        target = tmp_path / "a.mp4"
        openai.videos.download_content(done.id).write_to_file(target)
        assert target.read_bytes().startswith(b"mp4 ")
        gone = openai.videos.delete(done.id)
        assert gone.deleted and gone.object == "video.deleted" and gone.id == done.id
        assert client.get(f"/jobs/{done.id}").status_code == 404
        assert [model.id for model in openai.models.list()] == ["fake"]


def test_the_stock_client_understands_refusals(client: TestClient) -> None:
    import openai as package

    with stock_client(client) as openai:
        with pytest.raises(package.UnprocessableEntityError, match="size must be WIDTHxHEIGHT"):
            openai.videos.create(prompt="a", size="big")
        with pytest.raises(package.NotFoundError):
            openai.videos.retrieve("nowhere")
        with pytest.raises(package.UnprocessableEntityError, match="from text only"):
            openai.videos.create(prompt="a", input_reference=("a.png", b"x", "image/png"))


@pytest.mark.parametrize("is_form", [False, True])
def test_json_and_forms_are_the_same(client: TestClient, is_form: bool) -> None:
    body = {"prompt": "a", "seed": 7, "size": "64x96", "fps": 8, "seconds": "1"}
    sent: Any = {"files": {name: (None, str(value)) for name, value in body.items()}} if is_form else {"json": body}
    video = client.post("/v1/videos", **sent).json()
    assert (video["seed"], video["size"], video["fps"], video["num_frames"]) == (7, "64x96", 8, 9)
    job = client.get(f"/jobs/{video['id']}").json()
    assert job["params"]["height"] == 96 and job["params"]["width"] == 64


def test_a_finished_video_has_what_aiperf_reads(client: TestClient) -> None:
    video_id = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]
    video = until(lambda: v if (v := client.get(f"/v1/videos/{video_id}").json())["status"] == "completed" else None)
    assert video["inference_time_s"] == pytest.approx(0.02825, abs=1e-4) and video["peak_memory_mb"] == 12.5
    assert video["completed_at"] >= video["created_at"] and video["error"] is None
    content = client.get(f"/v1/videos/{video_id}/content")
    assert content.status_code == 200 and content.headers["content-type"] == "video/mp4"
    refusal(client.get(f"/v1/videos/{video_id}/content", params={"variant": "thumbnail"}), 422, "invalid_request")


def test_sync_answers_the_bytes_with_timing_headers(client: TestClient) -> None:
    answer = client.post("/v1/videos/sync", data={"prompt": "a", "seed": "5"})
    assert answer.status_code == 200 and answer.content.startswith(b"mp4 ")
    assert answer.headers["x-model"] == "fake" and answer.headers["x-inference-time-s"] == "0.0283"
    assert json.loads(answer.headers["x-stage-durations"])["text"] == 0.001
    assert answer.headers["x-peak-memory-mb"] == "12.5"
    assert client.get(f"/v1/videos/{answer.headers['x-request-id']}").json()["seed"] == 5
    assert answer.content == post(client, "a", seed=5).content


def test_a_failed_and_a_cancelled_video_tell_why(client: TestClient) -> None:
    failed = client.post("/v1/videos", json={"prompt": "oom"}).json()["id"]
    video = until(lambda: v if (v := client.get(f"/v1/videos/{failed}").json())["status"] == "failed" else None)
    assert video["error"]["code"] == "out_of_memory"
    cancelled = begin(client, "wait /dev/null/never")
    client.delete(f"/jobs/{cancelled}")
    video = client.get(f"/v1/videos/{cancelled}").json()
    assert video["status"] == "failed" and video["error"]["code"] == "cancelled"


def test_deleting_a_running_video_cancels_it(client: Any) -> None:
    video_id = client.post("/v1/videos", json={"prompt": "wait /dev/null/never"}).json()["id"]
    until(lambda: client.runner.ran)
    assert client.delete(f"/v1/videos/{video_id}").json()["deleted"] is True
    refusal(client.get(f"/v1/videos/{video_id}"), 404, "not_found")
    assert post(client, "next").status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": "a", "size": "64"}, "size must be WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "64x60"}, "height must be a multiple of 16"),
        ({"prompt": "a", "size": "64x64", "width": 64}, "give size, or width and height, not both"),
        ({"prompt": "a", "seconds": "0"}, "seconds must be above 0"),
        ({"prompt": "a", "seconds": "nan"}, "seconds must be above 0"),
        ({"prompt": "a", "seconds": "100"}, "num_frames must be 4k + 1"),
        ({"prompt": "a", "seconds": 1, "num_frames": 17}, "give seconds or num_frames"),
        ({"prompt": "a", "n": 2}, "n must be 1"),
        ({"prompt": "a", "model": "sora-2"}, "model must be one of fake, got 'sora-2'"),
        ({"prompt": "a", "seed": "x"}, "seed: Input should be a valid integer"),
        ({"prompt": "a", "num_inference_steps": 50}, "this is a distilled student, which was trained for exactly 4"),
        ({"prompt": "a", "negative_prompt": "b"}, "this is a distilled student, which has no guidance"),
        ({"prompt": "a", "input_reference": {"image_url": "x"}}, "this model makes videos from text only"),
        ({"prompt": "a", "output_path": "/etc/passwd"}, "unknown field 'output_path'"),
        ([], "send a JSON object"),
    ],
)
def test_bad_bodies_are_refused_in_one_sentence(client: TestClient, body: Any, message: str) -> None:
    for path in ("/v1/videos", "/v1/videos/sync"):
        assert refusal(client.post(path, json=body), 422, "invalid_request").startswith(message)
    assert client.get("/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"\xff", "application/json"),
        (b"[" * 50_000, "application/json"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"--x", "multipart/form-data"),
        (b"", "text/plain"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(client: TestClient, content: bytes, kind: str) -> None:
    answer = client.post("/v1/videos", content=content, headers={"content-type": kind})
    refusal(answer, 422, "invalid_request")


def test_a_model_is_found_by_its_name(client: TestClient) -> None:
    model = client.get("/v1/models/fake").json()
    assert model["id"] == "fake" and model["lossy"] == ""
    assert model["qualities"] == ["lossless", "high", "medium", "low"]
    refusal(client.get("/v1/models/sora-2"), 404, "not_found")


def test_what_the_routes_answer_is_documented(client: Any) -> None:
    """Found by schemathesis; `make faults` runs it."""
    paths = client.get("/openapi.json").json()["paths"]
    refusal(client.get("/v1/videos", params={"after": "0" * 40}), 404, "not_found")
    assert "404" in paths["/v1/videos"]["get"]["responses"]
    stream = paths["/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    assert set(stream["properties"]) == {"id", "event", "data"}


@pytest.mark.parametrize(("eta_s", "wait_ms"), [(None, 1000), (0.0, 50), (2.0, 500), (3600.0, 5000)])
def test_poll_after_is_a_quarter_of_what_is_left_within_bounds(eta_s: float | None, wait_ms: int) -> None:
    assert poll_after_ms(eta_s) == wait_ms
