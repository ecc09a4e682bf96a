"""The worker's loop without a process: one message per outcome, and a loop that no job can end."""

import io
import json
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from codmd_serve import engine as engine_module
from codmd_serve import worker
from codmd_serve.config import ENGINE_SETTINGS
from codmd_serve.errors import CancelledError, CheckpointError, GenerationError

PARAMS = {"prompt": "a", "seed": 1, "height": 32, "width": 32, "num_frames": 9, "fps": 16, "crf": 18}
JOB = {"type": "generate", "id": "j1", "path": "/nowhere/a.mp4", "params": PARAMS}


class FakeEngine:
    """Reports one step, then returns or raises what it was given; a Future stays as it is."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.seen: list[Any] = []

    def begin(self, params: Any, path: Path, on_progress: Any) -> Any:
        self.seen.append((params, path))
        on_progress("denoise", 1, 4)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if isinstance(self.outcome, Future):
            return self.outcome
        video: Future[Any] = Future()
        video.set_result(self.outcome)
        return video


def run(outcome: Any, cancelled: set[str] | None = None) -> tuple[FakeEngine, list[worker.Message]]:
    engine, sent = FakeEngine(outcome), list[worker.Message]()
    worker.run_job(engine, JOB, set() if cancelled is None else cancelled, sent.append)  # type: ignore[arg-type]
    return engine, sent


def test_a_finished_job_is_told_with_its_progress() -> None:
    engine, sent = run(SimpleNamespace(timings_ms={"text": 1.5}, warnings=["w"]))
    assert sent == [
        {"type": "started", "id": "j1"},
        {"type": "progress", "id": "j1", "stage": "denoise", "done": 1, "total": 4},
        {"type": "done", "id": "j1", "timings_ms": {"text": 1.5}, "warnings": ["w"]},
    ]
    params, path = engine.seen[0]
    assert params.prompt == "a" and params.num_frames == 9 and path == Path("/nowhere/a.mp4")


def test_a_failure_on_purpose_keeps_its_code_and_message() -> None:
    sent = run(GenerationError("no room", "out_of_memory"))[1]
    assert sent[-1] == {"type": "failed", "id": "j1", "code": "out_of_memory", "message": "no room"}


def test_an_unexpected_failure_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    sent = run(KeyError("a secret"))[1]
    assert sent[-1]["code"] == "internal_error" and "secret" not in sent[-1]["message"]
    assert "j1" in sent[-1]["message"] and "a secret" in caplog.text


def test_a_cancelled_job_stops_at_the_next_step_and_its_id_is_forgotten() -> None:
    cancelled = {"j1", "j2"}
    sent = run(SimpleNamespace(timings_ms={}, warnings=[]), cancelled)[1]
    assert sent == [{"type": "started", "id": "j1"}, {"type": "cancelled", "id": "j1"}]
    assert cancelled == {"j2"}


def test_cancelling_from_inside_is_the_same() -> None:
    assert run(CancelledError("enough"))[1][-1] == {"type": "cancelled", "id": "j1"}


def test_a_job_is_told_when_its_encoder_has_ended_which_may_be_later() -> None:
    video: Future[Any] = Future()
    sent = run(video)[1]
    assert [message["type"] for message in sent] == ["started", "progress"]
    video.set_result(SimpleNamespace(timings_ms={}, warnings=[]))
    assert sent[2:] == [{"type": "done", "id": "j1", "timings_ms": {}, "warnings": []}]


@pytest.mark.parametrize("error", [GenerationError("ffmpeg failed: 3", "encode_failed"), KeyError("a secret")])
def test_an_encoder_that_fails_is_told_like_any_failure(error: Exception) -> None:
    video: Future[Any] = Future()
    sent = run(video)[1]
    video.set_exception(error)
    expected = error.code if isinstance(error, GenerationError) else "internal_error"
    assert len(sent) == 3 and (sent[2]["type"], sent[2]["code"]) == ("failed", expected)
    assert "secret" not in sent[2]["message"]


def test_the_inbox_gives_jobs_in_order_and_takes_back_what_waits() -> None:
    inbox = worker.Inbox()
    for name in "abc":
        assert inbox.put({"id": name}), "nobody awaits it"
    assert inbox.take_back("b") and not inbox.take_back("b") and not inbox.take_back("z")
    assert [inbox.take()["id"] for _ in range(2)] == ["a", "c"]
    assert not inbox.take_back("a"), "it is being done"


def test_the_inbox_says_whether_a_job_has_to_wait() -> None:
    inbox = worker.Inbox()
    taken: list[worker.Message] = []
    taker = threading.Thread(target=lambda: taken.append(inbox.take()))
    taker.start()
    while not inbox._is_awaited:
        pass
    assert not inbox.put({"id": "a"}), "somebody takes it at once"
    taker.join()
    assert taken == [{"id": "a"}]
    assert inbox.put({"id": "b"})


def test_a_bundle_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_engine(*_: object, **settings: str) -> None:
        assert settings.keys() == set(ENGINE_SETTINGS)
        raise CheckpointError("the bundle is truncated")

    monkeypatch.setattr(engine_module, "load_engine", load_engine)
    sent: list[worker.Message] = []
    worker.serve({"bundle": "/nowhere", **dict.fromkeys(ENGINE_SETTINGS, "auto")}, io.StringIO(), sent.append)
    assert sent == [{"type": "fatal", "message": "the bundle is truncated"}]


def test_messages_survive_json() -> None:
    assert all(json.loads(json.dumps(message)) == message for message in run(GenerationError("x"))[1])
