"""/jobs: lists, lookups, cancelling, videos in parts, event streams."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from fake_runner import FACTS, PREVIEW
from fastapi.testclient import TestClient
from http_tests import DEADLINE_S, begin, job_of, post, refusal, status_is, until

from codmd_serve.api import backend as backend_module
from codmd_serve.api import jobs as jobs_module
from codmd_serve.api.backend import Own
from codmd_serve.api.content import parse_range
from codmd_serve.errors import StoreError
from codmd_serve.jobs.store import JobStore

Serve = Callable[..., AbstractContextManager[TestClient]]


def events_of(text: str) -> list[tuple[str, str, Any]]:
    """(id, event, data) of a stream."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.splitlines() if not line.startswith(":"))
        if "event" in fields:
            found.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
    return found


def kinds_of(text: str) -> list[str]:
    return [kind for _, kind, _ in events_of(text)]


def test_a_job_never_seen_is_not_found(client: TestClient) -> None:
    for path in ("/jobs/nowhere", "/jobs/nowhere/video", "/jobs/nowhere/events", "/jobs/..%2f..%2fetc"):
        refusal(client.get(path), 404, "not_found")
    refusal(client.delete("/jobs/nowhere"), 404, "not_found")


def test_jobs_are_listed_page_by_page(client: TestClient) -> None:
    ids = [post(client, str(number)).headers["content-location"].rpartition("/")[2] for number in range(3)]
    first = client.get("/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["jobs"]] == [ids[2], ids[1]] and first["next"] == ids[1]
    rest = client.get("/jobs", params={"limit": 2, "after": first["next"]}).json()
    assert [job["id"] for job in rest["jobs"]] == [ids[0]] and rest["next"] is None
    assert client.get("/jobs", params={"status": "failed"}).json()["jobs"] == []
    assert len(client.get("/jobs", params={"status": "completed"}).json()["jobs"]) == 3


@pytest.mark.parametrize(
    ("query", "field"), [({"limit": 0}, "limit"), ({"status": "lost"}, "status"), ({"after": "nowhere"}, "after")]
)
def test_a_senseless_list_is_refused(client: TestClient, query: dict[str, Any], field: str) -> None:
    answer = client.get("/jobs", params=query)
    assert refusal(answer, 422, "invalid_request").startswith(field) and answer.json()["error"]["field"] == field


def test_a_job_tells_its_place_and_time(client: TestClient, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    running, *waiting = [begin(client, f"wait {gate} {number}"[: -2 if number else None]) for number in range(3)]
    until(lambda: job_of(client, running)["stage"] == "denoise")
    job = job_of(client, running)
    assert job["status"] == "running" and job["step"] == 1 and job["position"] is None
    assert 0 < job["progress"] < 0.7 and 0 < job["eta_s"] < 2.5
    assert [job_of(client, job_id)["position"] for job_id in waiting] == [0, 1]
    first, second = (job_of(client, job_id)["eta_s"] for job_id in waiting)
    assert first >= 2.5 and second == first + 2.5
    gate.touch()


# cancelling


def test_a_waiting_job_is_cancelled_at_once(client: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    running, waiting = begin(client, f"wait {gate}"), begin(client, "b")
    answer = client.delete(f"/jobs/{waiting}")
    assert answer.status_code == 200 and answer.json()["status"] == "cancelled"
    gate.touch()
    status_is(client, running, "completed")
    assert "b" not in client.runner.ran
    refusal(client.get(f"/jobs/{waiting}/video"), 409, "no_video")


def test_a_running_job_is_cancelled_within_a_step_and_frees_the_device(client: Any) -> None:
    running = begin(client, "wait /dev/null/never")
    until(lambda: job_of(client, running)["stage"] == "denoise")
    answer = client.delete(f"/jobs/{running}")
    assert answer.status_code == 200 and answer.json()["status"] == "cancelled"
    assert answer.json()["error"]["code"] == "cancelled"
    assert post(client, "next").status_code == 200


def test_a_cancel_that_comes_too_late_answers_the_final_state(client: Any, tmp_path: Path) -> None:
    """The other side of the race: the job does not hear, and is done first."""
    gate = tmp_path / "gate"
    job_id = begin(client, f"deaf {gate}")
    until(lambda: job_of(client, job_id)["stage"] == "denoise")
    with ThreadPoolExecutor() as pool:
        cancelling = pool.submit(client.delete, f"/jobs/{job_id}")
        until(lambda: client.backend.store.get(job_id).is_cancel_requested)
        gate.touch()
        assert cancelling.result(DEADLINE_S).json()["status"] == "completed"
    for _ in range(2):
        answer = client.delete(f"/jobs/{job_id}")
        assert answer.status_code == 200 and answer.json()["status"] == "completed"
    assert client.get(f"/jobs/{job_id}/video").status_code == 200


# the video


def test_a_video_is_served_whole_and_in_parts(client: TestClient) -> None:
    answer = post(client, "a", seed=5)
    path = answer.headers["content-location"] + "/video"
    whole = client.get(path)
    assert whole.content == answer.content and whole.headers["content-type"] == "video/mp4"
    assert whole.headers["content-disposition"] == 'inline; filename="codmd-5.mp4"'
    assert "immutable" in whole.headers["cache-control"] and whole.headers["accept-ranges"] == "bytes"
    etag = whole.headers["etag"]
    part = client.get(path, headers={"Range": "bytes=4-9"})
    assert part.status_code == 206 and part.content == answer.content[4:10]
    assert part.headers["content-range"] == f"bytes 4-9/{len(answer.content)}" and part.headers["etag"] == etag
    assert client.get(path, headers={"Range": "bytes=-3"}).content == answer.content[-3:]
    assert client.get(path, headers={"Range": "bytes=4-9", "If-Range": '"other"'}).status_code == 200
    same = client.get(path, headers={"If-None-Match": f'"x", W/{etag}'})
    assert same.status_code == 304 and same.content == b""
    head = client.head(path)
    assert head.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == str(len(answer.content))
    past = client.get(path, headers={"Range": "bytes=100000-"})
    refusal(past, 416, "range_not_satisfiable")
    assert past.headers["content-range"] == f"bytes */{len(answer.content)}"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, 10)),
        ("bytes=5-99", (5, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=0-1,4-5", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
    ],
)
def test_a_range_is_read_or_ignored(text: str, wanted: tuple[int, int] | None) -> None:
    assert parse_range(text, 10) == wanted


@pytest.mark.parametrize(("format", "media_type"), [("mp4", "video/mp4"), ("gif", "image/gif"), ("webp", "image/webp")])
def test_a_video_has_the_type_and_the_name_of_its_format(client: TestClient, format: str, media_type: str) -> None:
    answer = post(client, "a", seed=5, format=format)
    video = client.get(answer.headers["content-location"] + "/video")
    content = client.get(answer.headers["content-location"].replace("/jobs", "/v1/videos") + "/content")
    for each in (answer, video, content):
        assert each.status_code == 200 and each.headers["content-type"] == media_type
        assert each.headers["content-disposition"] == f'inline; filename="codmd-5.{format}"'
    assert client.get(answer.headers["content-location"]).json()["params"]["format"] == format
    again = post(client, "a", seed=5, format=format)
    assert again.headers["etag"] == answer.headers["etag"], "answered from the store"
    others = {"mp4": "gif", "gif": "webp", "webp": "mp4"}
    other = post(client, "a", seed=5, format=others[format])
    assert other.headers["etag"] != answer.headers["etag"] and other.headers["content-type"] != media_type
    assert len(client.runner.ran) == 2  # type: ignore[attr-defined]


def test_a_video_that_is_not_ready_is_a_conflict(client: TestClient, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job_id = begin(client, f"wait {gate}")
    assert "not ready" in refusal(client.get(f"/jobs/{job_id}/video"), 409, "not_finished")
    gate.touch()


def test_a_video_that_expired_or_vanished_is_gone(client: Any) -> None:
    location = post(client, "a", seed=1).headers["content-location"]
    for path in client.backend.results.folder.rglob("*.mp4"):
        path.unlink()
    refusal(client.get(location + "/video"), 410, "expired")
    assert client.get(location).json()["status"] == "expired"
    assert post(client, "a", seed=1).status_code == 200 and client.runner.ran == ["a", "a"]


# events


def test_the_events_of_a_job_tell_its_whole_story(client: TestClient) -> None:
    answer = client.get(f"/jobs/{begin(client, 'a', preview=True)}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    kinds = [kind for _, kind, _ in events if kind != "queued"]
    assert kinds == ["started", "text", "step", "step", "step", "step", "decoding", "done"]
    steps = [data for _, kind, data in events if kind == "step"]
    assert [(data["step"], data["num_steps"], data["preview"]) for data in steps] == [
        (step, 4, PREVIEW) for step in (1, 2, 3, 4)
    ]
    shares = [data["progress"] for _, kind, data in events if "progress" in data]
    assert shares == sorted(shares)
    assert events[-2][2]["frames"] == 17 and events[-1][2] == {"status": "completed"}


def test_previews_come_only_when_asked_for(client: TestClient) -> None:
    text = client.get(f"/jobs/{begin(client, 'a')}/events").text
    assert "step" in kinds_of(text) and "preview" not in text


@pytest.mark.parametrize(("prompt", "kind"), [("oom", "failed"), ("die", "failed")])
def test_a_failure_is_an_event_with_its_code(client: TestClient, prompt: str, kind: str) -> None:
    last = events_of(client.get(f"/jobs/{begin(client, prompt)}/events").text)[-1]
    assert last[1] == kind and last[2]["error"]["code"] in ("out_of_memory", "worker_died")


def test_a_cancellation_is_an_event(client: TestClient) -> None:
    job_id = begin(client, "wait /dev/null/never")
    with ThreadPoolExecutor() as pool:
        following = pool.submit(client.get, f"/jobs/{job_id}/events")
        until(lambda: job_of(client, job_id)["stage"] == "denoise")
        client.delete(f"/jobs/{job_id}")
        assert kinds_of(following.result(DEADLINE_S).text)[-1] == "cancelled"


def test_a_waiting_job_tells_its_position_as_it_changes(client: TestClient, tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    begin(client, f"wait {first}")
    begin(client, f"wait {second}")
    last = begin(client, "c")
    with ThreadPoolExecutor() as pool:
        following = pool.submit(client.get, f"/jobs/{last}/events")
        until(lambda: client.backend.hub.known(last) and client.backend.hub.known(last).events)  # type: ignore[attr-defined]
        first.touch()
        until(lambda: job_of(client, last)["position"] == 0)
        until(lambda: client.backend.hub.known(last).events[-1].data.get("position") == 0)  # type: ignore[attr-defined]
        second.touch()
        events = events_of(following.result(DEADLINE_S).text)
    positions = [data["position"] for _, kind, data in events if kind == "queued"]
    assert list(dict.fromkeys(positions)) == [1, 0], "one more event where only eta_s has changed"
    assert events[-1][1] == "done"


def test_last_event_id_resumes_and_one_of_another_server_starts_over(client: TestClient) -> None:
    job_id = begin(client, "a")
    status_is(client, job_id, "completed")
    events = events_of(client.get(f"/jobs/{job_id}/events").text)
    third = events[2][0]
    rest = events_of(client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": third}).text)
    assert rest == events[3:]
    for other in ("", "x", "feed-3", third.replace("-", "x-"), events[0][0].rpartition("-")[0] + "-99999999999999"):
        assert events_of(client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": other}).text) == events


def test_a_silent_job_is_kept_alive_with_comments(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "KEEP_ALIVE_S", 0.01)
    gate = tmp_path / "gate"
    begin(client, f"wait {gate}")
    waiting = begin(client, "b")
    with ThreadPoolExecutor() as pool:
        following = pool.submit(client.get, f"/jobs/{waiting}/events")
        until(lambda: client.backend.hub.known(waiting) is not None)  # type: ignore[attr-defined]
        # At least one turn of the stream passes without news.
        until(lambda: job_of(client, waiting)["status"] == "queued")
        with pytest.raises(TimeoutError):
            following.result(0.1)
        gate.touch()
        text = following.result(DEADLINE_S).text
    assert ": keep-alive\n\n" in text and kinds_of(text)[-1] == "done"


def test_the_story_of_a_job_of_another_process_ends_too(client: Any) -> None:
    """Nothing was heard of it here: the store alone tells."""
    location = post(client, "a").headers["content-location"]
    client.backend.hub.forget(location.rpartition("/")[2])
    assert kinds_of(client.get(location + "/events").text) == ["done"]


def test_a_job_that_begins_and_ends_while_its_place_is_read_is_not_told_as_queued(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found on a busy machine: a stale `queued` came between `decoding` and `done`, and a bar went back to 0."""
    gate = tmp_path / "gate"
    begin(client, f"wait {gate}")
    job_id = begin(client, "b")
    position = client.backend.position

    async def slow(job: Any) -> Any:
        place = await position(job)
        if job.id == job_id and job.status == "queued":
            gate.touch()
            async with asyncio.timeout(DEADLINE_S):
                while not any(event.kind == "done" for event in client.backend.hub.known(job_id).events):
                    await asyncio.sleep(0.001)
        return place

    monkeypatch.setattr(client.backend, "position", slow)
    kinds = kinds_of(client.get(f"/jobs/{job_id}/events").text)
    assert kinds == ["started", "text", "step", "step", "step", "step", "decoding", "done"]


def test_news_that_come_while_the_store_is_read_are_not_waited_for_again(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read says `running`, the end comes before it returns, and no other event wakes the listener."""
    for module in (backend_module, jobs_module):
        monkeypatch.setattr(module, "POLL_S", 3600.0)
    gates = [tmp_path / "1", tmp_path / "2"]
    get = client.backend.get

    async def slow(job_id: str, owner: str | None) -> Any:
        found = await get(job_id, owner)
        if found is not None and found.status == "running" and owner is None:
            for gate in gates:
                gate.touch()
            async with asyncio.timeout(DEADLINE_S):
                while not (await get(job_id, owner)).is_final:
                    await asyncio.sleep(0.001)
        return found

    monkeypatch.setattr(client.backend, "get", slow)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(post, client, f"wait {gates[0]}").result(DEADLINE_S).status_code == 200
        job_id = begin(client, f"wait {gates[1]}")
        following = pool.submit(client.get, f"/jobs/{job_id}/events")
        assert kinds_of(following.result(DEADLINE_S).text)[-1] == "done"


def test_a_stream_outlives_a_store_that_is_away(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "POLL_S", 0.01)
    job_id = begin(client, "a")
    status_is(client, job_id, "completed")
    get, failures = client.backend.get, [StoreError("gone"), StoreError("gone")]

    async def flaky(job_id: str, owner: str | None) -> Any:
        if owner is None and failures:
            raise failures.pop()
        return await get(job_id, owner)

    monkeypatch.setattr(client.backend, "get", flaky)
    assert kinds_of(client.get(f"/jobs/{job_id}/events").text)[-1] == "done" and not failures


# leaving


def test_a_job_that_its_client_left_is_cancelled_when_nobody_follows_it(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "LEAVE_GRACE_S", 0.01)
    running, waiting = begin(client, f"wait {tmp_path / 'never'}"), begin(client, "b")
    for job_id in (waiting, running):
        assert client.post(f"/jobs/{job_id}/leave").status_code == 202
        assert client.post(f"/jobs/{job_id}/leave").status_code == 202, "saying it twice is no error"
    for job_id in (waiting, running):
        status_is(client, job_id, "cancelled")


def test_a_job_that_somebody_else_follows_goes_on(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "LEAVE_GRACE_S", 0.01)
    gate = tmp_path / "gate"
    job_id = begin(client, f"wait {gate}")
    hub = client.backend.hub
    with ThreadPoolExecutor(1) as other:
        followed = other.submit(lambda: kinds_of(client.get(f"/jobs/{job_id}/events").text))
        try:
            until(lambda: (channel := hub.known(job_id)) is not None and channel.num_listeners)
            client.post(f"/jobs/{job_id}/leave")
            until(lambda: not client.backend._leaving)
            assert job_of(client, job_id)["status"] == "running"
        finally:
            gate.touch()
        assert followed.result(DEADLINE_S)[-1] == "done"


def test_leaving_a_finished_or_unknown_job_changes_nothing(client: Any) -> None:
    refusal(client.post("/jobs/nowhere/leave"), 404, "not_found")
    job_id = begin(client, "a")
    status_is(client, job_id, "completed")
    assert client.post(f"/jobs/{job_id}/leave").json()["status"] == "completed"
    assert not client.backend._leaving


# names to save by


@pytest.mark.parametrize("name", ["a-ring-7.mp4", "A1.webp"])
def test_a_video_is_saved_under_the_name_that_was_asked_for(client: Any, name: str) -> None:
    job_id = begin(client, "a")
    status_is(client, job_id, "completed")
    named = client.get(f"/jobs/{job_id}/video/{name}")
    assert named.status_code == 200 and named.content == client.get(f"/jobs/{job_id}/video").content
    assert named.headers["content-disposition"] == f'attachment; filename="{name}"'
    assert client.get(f"/jobs/{job_id}/video/{name}", headers={"Range": "bytes=1-2"}).status_code == 206


@pytest.mark.parametrize(
    "name", ["a.exe", "a b.mp4", 'a".mp4', "a%0d%0ab.mp4", ".mp4", "..%2fa.mp4", "x" * 200 + ".mp4"]
)
def test_a_name_that_is_none_is_not_found(client: Any, name: str) -> None:
    job_id = begin(client, "a")
    refusal(client.get(f"/jobs/{job_id}/video/{name}"), 404, "not_found")


def test_a_job_says_that_no_worker_serves_its_bundle(serve: Serve, tmp_path: Path) -> None:
    """A server that comes back with another bundle, and an API alone: the job of the first one waits, and says so."""
    with serve() as client:
        known = post(client, "before").status_code
        assert known == 200
    with serve(is_alone=True) as client:
        ready = client.get("/ready")
        assert ready.status_code == 503 and ready.json()["reason"] == "no worker serves the bundle fake"
        job_id = begin(client, "waits")  # accepted all the same
        job = job_of(client, job_id)
        assert job["status"] == "queued" and job["eta_s"] is None
        assert job["waiting_for"] == "no worker serves the bundle fake"
        until(lambda: client.get("/health").json()["num_unserved"] == 1)
    other = Own("c" * 64, "other", "e" * 64, FACTS)
    with serve(own=other) as client:
        assert job_of(client, job_id)["waiting_for"] == "no worker serves the bundle fake"
        until(lambda: client.get("/ready").json()["num_unserved"] == 1)
        gate = tmp_path / "gate"
        own = [begin(client, f"wait {gate}"), begin(client, "behind it")]
        assert [job_of(client, each)["waiting_for"] for each in own] == [None, None]
        gate.touch()
        with client.stream("GET", f"/jobs/{job_id}/events") as stream:
            line = next(line for line in stream.iter_lines() if line.startswith("data: "))
            assert json.loads(line[6:])["waiting_for"] == "no worker serves the bundle fake"
            client.delete(f"/jobs/{job_id}")
    with serve() as client:
        job_id = begin(client, "served again")
        assert status_is(client, job_id, "completed")["waiting_for"] is None


def test_a_job_that_nobody_serves_for_long_ends(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as client:
        assert post(client, "before").status_code == 200
    with serve(is_alone=True) as client:
        job_id = begin(client, "waits")
    monkeypatch.setattr(backend_module, "SWEEP_S", 0.0)
    with serve(is_alone=True, unserved_hours=0) as client:
        until(lambda: client.get("/health").json()["num_unserved"] == 1)
        assert job_of(client, job_id)["status"] == "queued", "0 is for ever"
    with serve(is_alone=True) as client:
        assert job_of(client, job_id)["status"] == "queued", "a week is not over"
        fail = client.backend.store.fail_unserved  # type: ignore[attr-defined]
        monkeypatch.setattr(JobStore, "fail_unserved", lambda store, after_s: fail(after_s - 3600.0 * 168 - 1.0))
        error = status_is(client, job_id, "failed")["error"]
        assert error["code"] == "not_served"
        refusal(client.get(f"/jobs/{job_id}/video"), 409, "no_video")
