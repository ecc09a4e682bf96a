"""The worker's loop without a process: one message per outcome, and a loop that no job can end."""

import base64
import io
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_runner import FACTS

from codmd_serve import loading as loading_module
from codmd_serve import worker
from codmd_serve.config import ENGINE_SETTINGS, GenerateParams
from codmd_serve.errors import CancelledError, CheckpointError, GenerationError
from codmd_serve.messages import Cancelled, Done, Failed, Fatal, FromWorker, Generate, Load, Progress, Ready, Started

PARAMS = GenerateParams(prompt="a", seed=1, height=32, width=32, num_frames=9, fps=16, crf=18)
# The worker makes the folder of the video, also as root.
VIDEO = Path(tempfile.gettempdir()) / "codmd-serve-test-worker" / "a.mp4"


def job(name: str) -> Generate:
    return Generate(name, str(VIDEO), PARAMS)


class FakeEngine:
    """Reports one step, then returns or raises what it was given; a Future stays as it is."""

    def __init__(self, outcome: Any) -> None:
        self.facts, self.later_facts = FACTS, FACTS
        self.outcome = outcome
        self.seen: list[Any] = []

    def begin(self, params: Any, path: Path, on_progress: Any, on_preview: Any) -> Any:
        self.seen.append((params, path))
        on_progress("denoise", 1, 4)
        self.facts = self.later_facts
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if isinstance(self.outcome, Future):
            return self.outcome
        video: Future[Any] = Future()
        video.set_result(self.outcome)
        return video


def run(outcome: Any, cancelled: set[str] | None = None) -> tuple[FakeEngine, list[FromWorker]]:
    engine, sent = FakeEngine(outcome), list[FromWorker]()
    worker.run_job(engine, job("j1"), set() if cancelled is None else cancelled, sent.append)  # type: ignore[arg-type]
    return engine, sent


def test_a_finished_job_is_told_with_its_progress() -> None:
    engine, sent = run(SimpleNamespace(timings_ms={"text": 1.5}, warnings=["w"], peak_memory_mb=3.5))
    assert sent == [
        Started("j1"),
        Progress("j1", "denoise", 1, 4),
        Done("j1", {"text": 1.5}, ["w"], 3.5),
    ]
    params, path = engine.seen[0]
    assert params.prompt == "a" and params.num_frames == 9 and path == VIDEO


def test_a_fallback_in_the_middle_of_a_job_is_told_before_its_outcome() -> None:
    engine, sent = FakeEngine(SimpleNamespace(timings_ms={}, warnings=[], peak_memory_mb=0.0)), list[FromWorker]()
    engine.later_facts = replace(FACTS, vae_dtype="float32", fallback="VAE in float32: out of range")
    for name in ("j1", "j2"):
        worker.run_job(engine, job(name), set(), sent.append)  # type: ignore[arg-type]
    told = [message for message in sent if not isinstance(message, Progress | Started)]
    assert told == [Ready(engine.later_facts), Done("j1", {}, [], 0.0), Done("j2", {}, [], 0.0)]


def test_a_failure_on_purpose_keeps_its_code_and_message() -> None:
    sent = run(GenerationError("no room", "out_of_memory"))[1]
    assert sent[-1] == Failed("j1", "out_of_memory", "no room")


def test_an_unexpected_failure_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    sent = run(KeyError("a secret"))[1]
    failed = sent[-1]
    assert isinstance(failed, Failed) and failed.code == "internal_error" and "secret" not in failed.message
    assert "j1" in failed.message and "a secret" in caplog.text


def test_a_cancelled_job_stops_at_the_next_step_and_its_id_is_forgotten() -> None:
    cancelled = {"j1", "j2"}
    sent = run(SimpleNamespace(timings_ms={}, warnings=[], peak_memory_mb=3.5), cancelled)[1]
    assert sent == [Started("j1"), Cancelled("j1")]
    assert cancelled == {"j2"}


def test_cancelling_from_inside_is_the_same() -> None:
    assert run(CancelledError("enough"))[1][-1] == Cancelled("j1")


def test_a_job_is_told_when_its_encoder_has_ended_which_may_be_later() -> None:
    video: Future[Any] = Future()
    sent = run(video)[1]
    assert [type(message) for message in sent] == [Started, Progress]
    video.set_result(SimpleNamespace(timings_ms={}, warnings=[], peak_memory_mb=3.5))
    assert sent[2:] == [Done("j1", {}, [], 3.5)]


@pytest.mark.parametrize("error", [GenerationError("ffmpeg failed: 3", "encode_failed"), KeyError("a secret")])
def test_an_encoder_that_fails_is_told_like_any_failure(error: Exception) -> None:
    video: Future[Any] = Future()
    sent = run(video)[1]
    video.set_exception(error)
    expected = error.code if isinstance(error, GenerationError) else "internal_error"
    failed = sent[-1]
    assert len(sent) == 3 and isinstance(failed, Failed) and failed.code == expected
    assert "secret" not in failed.message


def test_the_inbox_gives_jobs_in_order_and_takes_back_what_waits() -> None:
    inbox = worker.Inbox()
    for name in "abc":
        assert inbox.put(job(name)), "nobody awaits it"
    assert inbox.take_back("b") and not inbox.take_back("b") and not inbox.take_back("z")
    assert [inbox.take().id for _ in range(2)] == ["a", "c"]
    assert not inbox.take_back("a"), "it is being done"


def test_the_inbox_says_whether_a_job_has_to_wait() -> None:
    inbox = worker.Inbox()
    taken: list[FromWorker] = []
    taker = threading.Thread(target=lambda: taken.append(inbox.take()))
    taker.start()
    while not inbox._is_awaited:
        pass
    assert not inbox.put(job("a")), "somebody takes it at once"
    taker.join()
    assert taken == [job("a")]
    assert inbox.put(job("b"))


def test_a_bundle_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_engine(*_: object, **settings: str) -> None:
        assert settings.keys() == set(ENGINE_SETTINGS)
        raise CheckpointError("the bundle is truncated")

    monkeypatch.setattr(loading_module, "load_engine", load_engine)
    sent: list[FromWorker] = []
    worker.serve_jobs(Load("/nowhere", dict.fromkeys(ENGINE_SETTINGS, "auto")), io.StringIO(), sent.append)
    assert sent == [Fatal("the bundle is truncated")]


@pytest.mark.parametrize(
    ("device", "taken"), [("cuda:1", [1]), ("cuda", []), ("auto", []), ("cuda:7", []), ("cpu", [])]
)
def test_a_gpu_of_a_number_is_the_current_one_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, device: str, taken: list[int]
) -> None:
    """Kernels of some packages go to the current device, whatever device their tensors are on."""
    seen: list[int] = []
    order: list[list[int]] = []

    def load_engine(path: Path, **options: Any) -> None:
        order.append(list(seen))
        raise CheckpointError("enough")

    monkeypatch.setattr(loading_module, "load_engine", load_engine)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    settings = {**dict.fromkeys(ENGINE_SETTINGS, "auto"), "device": device}
    worker.serve_jobs(Load("/nowhere", settings), io.StringIO(), lambda message: None)
    assert order == [taken]


class AskingEngine(FakeEngine):
    """Asks again and again whether to go on, as while an encoder is waited for, and shows two previews."""

    def begin(self, params: Any, path: Path, on_progress: Any, on_preview: Any) -> Any:
        for step in (1, 2):
            if on_preview is not None:
                on_preview(b"picture %d" % step)
            on_progress("denoise", step, 4)
        for _ in range(5):
            on_progress("encode", 9, 9)
        return super().begin(params, path, on_progress, on_preview)


def ran(is_previewed: bool) -> list[FromWorker]:
    sent = list[FromWorker]()
    engine = AskingEngine(SimpleNamespace(timings_ms={}, warnings=[], peak_memory_mb=3.5))
    worker.run_job(engine, Generate("j1", str(VIDEO), PARAMS, is_previewed), set(), sent.append)  # type: ignore[arg-type]
    return sent


def test_progress_that_is_none_is_not_sent_again() -> None:
    sent = ran(is_previewed=False)
    assert [(each.stage, each.done) for each in sent if isinstance(each, Progress)] == [
        ("denoise", 1),
        ("denoise", 2),
        ("encode", 9),
        ("denoise", 1),
    ]
    assert not any(each.preview for each in sent if isinstance(each, Progress))


def test_a_preview_goes_with_the_progress_of_its_step_only() -> None:
    previews = [each.preview for each in ran(is_previewed=True) if isinstance(each, Progress)]
    assert [base64.b64decode(preview.partition(",")[2]) for preview in previews] == [
        b"picture 1",
        b"picture 2",
        b"",
        b"",
    ]
    assert previews[0].startswith("data:image/webp;base64,")


def test_s9_the_folder_of_the_video_is_made(tmp_path: Path) -> None:
    sent = list[FromWorker]()
    path = tmp_path / "spool" / "j1" / "a.mp4"
    engine = FakeEngine(SimpleNamespace(timings_ms={}, warnings=[], peak_memory_mb=3.5))
    worker.run_job(engine, Generate("j1", str(path), PARAMS), set(), sent.append)  # type: ignore[arg-type]
    assert path.parent.is_dir() and isinstance(sent[-1], Done)
