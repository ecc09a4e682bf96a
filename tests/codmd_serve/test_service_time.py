"""What a video is expected to take, and when one is taken to hang."""

from dataclasses import replace

import pytest

from codmd_serve import service_time
from codmd_serve.config import GenerateParams, ModelFacts, TeacherFacts
from codmd_serve.service_time import DEADLINE_FACTOR, STALL_FACTOR, ServiceTimes, encoder_limit_s

NATIVE = GenerateParams(prompt="a", seed=1, height=64, width=64, num_frames=16, fps=16, crf=18)
FACTS = ModelFacts(
    name="tiny",
    device="cpu",
    dtype="float32",
    attention="math",
    execution="eager",
    num_steps=4,
    height=64,
    width=64,
    num_frames=16,
    fps=16,
    size_multiple=16,
    max_side_px=1024,
    frame_multiple=4,
    max_num_frames=101,
    service_s=2.0,
    load_s=0.1,
)


def test_the_native_shape_is_known_from_the_start_and_others_are_scaled() -> None:
    times = ServiceTimes(FACTS)
    assert times.expected_s(NATIVE) == 2.0
    assert times.expected_s(replace(NATIVE, height=128)) == 4.0
    assert times.expected_s(replace(NATIVE, num_frames=8)) == 1.0


def test_each_shape_learns_from_its_own_videos() -> None:
    times, large = ServiceTimes(FACTS), replace(NATIVE, width=128)
    times.add(large, 9.0)
    assert times.expected_s(large) == 9.0 and times.expected_s(NATIVE) == 2.0
    for _ in range(30):
        times.add(NATIVE, 1.0)
    assert times.expected_s(NATIVE) == pytest.approx(1.0, abs=1e-4)


def test_only_recent_shapes_are_kept_and_the_native_one_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_time, "MAX_SHAPES_KEPT", 3)
    times = ServiceTimes(FACTS)
    for frames in (32, 48, 64, 80):
        times.add(replace(NATIVE, num_frames=frames), 100.0)
    assert times.expected_s(replace(NATIVE, num_frames=80)) == 100.0
    assert times.expected_s(replace(NATIVE, num_frames=32)) == 4.0, "forgotten, and scaled again"
    assert times.expected_s(NATIVE) == 2.0


def test_limits_grow_with_the_square_of_an_unknown_shape() -> None:
    times, large = ServiceTimes(FACTS), replace(NATIVE, height=256)
    assert times.stall_s(NATIVE, 60.0) == 60.0 + STALL_FACTOR * 2.0
    assert times.stall_s(large, 60.0) == 60.0 + STALL_FACTOR * 32.0
    assert times.deadline_s(large, 120.0) == 120.0 + DEADLINE_FACTOR * 32.0
    assert times.deadline_s(replace(NATIVE, height=16), 0.0) == DEADLINE_FACTOR * 0.5


def test_the_teacher_has_times_and_limits_of_its_own() -> None:
    teacher = TeacherFacts(name="base", fingerprint="f", num_steps=50, guidance_scale=3.0, service_s=40.0)
    times, slow = ServiceTimes(replace(FACTS, teacher=teacher)), replace(NATIVE, teacher="f")
    assert times.expected_s(slow) == 40.0 and times.expected_s(NATIVE) == 2.0
    assert times.expected_s(replace(slow, height=128)) == 80.0
    assert times.deadline_s(slow, 60.0) == 60.0 + DEADLINE_FACTOR * 40.0
    times.add(replace(slow, height=128), 30.0)
    assert times.expected_s(replace(slow, height=128)) == 30.0
    assert times.expected_s(replace(NATIVE, height=128)) == 4.0


def test_each_format_learns_from_its_own_videos() -> None:
    times = ServiceTimes(FACTS)
    times.add(replace(NATIVE, format="gif"), 40.0)
    assert times.expected_s(NATIVE) == 2.0 and times.expected_s(replace(NATIVE, format="gif")) == 40.0


@pytest.mark.parametrize("format", ["mp4", "gif", "webp"])
def test_a_job_is_given_more_time_than_its_encoder(format: str) -> None:
    """ffmpeg is killed at a limit of its own, and the job says so: its worker must not be killed for it before."""
    times, large = ServiceTimes(FACTS), replace(NATIVE, height=480, width=832, num_frames=81, format=format)
    for limit_s in (times.stall_s, times.deadline_s):
        decoded_s = limit_s(large, 60.0, is_encoding=True)
        assert decoded_s > 60.0 + encoder_limit_s(480 * 832 * (64 if format == "mp4" else 81), format)
        assert (limit_s(large, 60.0) < decoded_s) is (format == "mp4"), "a gif may hold up its frames before"
