"""/models, and jobs of the teacher that runs beside the student."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_runner
import pytest
from fake_runner import FACTS
from fastapi.testclient import TestClient
from http_tests import begin, job_of, post, refusal, status_is

from codmd_serve.api.backend import engine_key
from codmd_serve.config import ServeConfig, TeacherFacts

Serve = Callable[..., AbstractContextManager[TestClient]]
TEACHER = TeacherFacts(name="base", fingerprint="f" * 32, num_steps=50, guidance_scale=3.0, service_s=40.0)
TAUGHT = replace(FACTS, about="It draws a ring.", examples=("a ring", "two rings"), teacher=TEACHER)


@pytest.fixture
def taught(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server with a teacher."""
    monkeypatch.setattr(fake_runner, "FACTS", TAUGHT)
    with serve(teacher=True) as client:
        yield client


def test_models_tell_what_a_client_needs_to_ask_for_a_video(taught: Any) -> None:
    answer = taught.get("/models")
    student, teacher = answer.json()["models"]
    assert (student["name"], student["is_teacher"], student["num_steps"], student["guidance_scale"]) == (
        "fake",
        False,
        4,
        1.0,
    )
    assert (teacher["name"], teacher["is_teacher"], teacher["num_steps"], teacher["guidance_scale"]) == (
        "base",
        True,
        50,
        3.0,
    )
    assert student["about"] == "It draws a ring." and student["examples"] == ["a ring", "two rings"]
    assert student["max_pixels"] == 4 * 64 * 64 * 17 and student["formats"] == ["mp4", "gif", "webp"]
    assert student["qualities"] == ["lossless", "high", "medium", "low"]
    assert student["service_s"] == 2.5 and teacher["service_s"] == 40.0
    assert {"device": "cpu", "attention": "none", "execution": "eager", "is_ready": True}.items() <= student.items()
    assert answer.json()["version"]


def test_without_a_teacher_there_is_none_to_name(client: Any) -> None:
    assert [model["name"] for model in client.get("/models").json()["models"]] == ["fake"]
    message = refusal(post(client, "a", model="base"), 422, "invalid_request")
    assert message == "model must be one of fake, got 'base'"


def test_while_it_loads_the_declared_facts_are_told_and_the_teacher_is_not_unknown(serve: Serve) -> None:
    with serve(is_ready=False, teacher=True) as client:
        (model,) = client.get("/models").json()["models"]
        assert not model["is_ready"] and model["reason"]
        refusal(post(client, "a", model="base"), 503, "not_ready")


def test_the_openai_style_list_names_both(taught: Any) -> None:
    assert [model["id"] for model in taught.get("/v1/models").json()["data"]] == ["fake", "base"]
    assert taught.get("/v1/models/base").status_code == 200


def test_a_job_of_the_teacher_says_so_and_is_another_video(taught: Any) -> None:
    student = status_is(taught, begin(taught, "a", seed=1), "completed")
    teacher = status_is(taught, begin(taught, "a", seed=1, model="base"), "completed")
    assert (student["model"], student["params"]["teacher"]) == ("fake", "")
    assert (teacher["model"], teacher["params"]["teacher"]) == ("base", TEACHER.fingerprint)
    videos = [taught.get(f"/jobs/{job['id']}/video").content for job in (student, teacher)]
    assert videos[0] != videos[1], "content keys tell them apart"
    again = [status_is(taught, begin(taught, "a", seed=1, model=name), "completed") for name in ("fake", "base")]
    assert [taught.get(f"/jobs/{job['id']}/video").content for job in again] == videos
    assert len(taught.runner.ran) == 2, "equal requests are answered from the store"


def test_a_student_job_has_the_content_key_that_it_had_without_a_teacher(tmp_path: Path) -> None:
    config = ServeConfig(bundle=str(tmp_path))
    assert engine_key(config) == engine_key(replace(config, teacher=True, text_cache="elsewhere"))
    assert engine_key(config) != engine_key(replace(config, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"guidance_scale": 5.0}, "this teacher is served with guidance_scale 3 only: leave it out"),
        ({"num_inference_steps": 4}, "this teacher is served with num_inference_steps 50 only: leave it out"),
        ({"negative_prompt": "ugly"}, "this teacher is served with the negative prompt of its folder only"),
    ],
)
def test_the_teacher_is_sampled_in_one_way_only(taught: Any, body: dict[str, Any], words: str) -> None:
    answer = post(taught, "a", model="base", **body)
    assert refusal(answer, 422, "invalid_request").startswith(words)
    assert answer.json()["error"]["field"] == next(iter(body))


def test_its_own_settings_may_be_said(taught: Any) -> None:
    assert post(taught, "a", model="base", guidance_scale=3.0, num_inference_steps=50).status_code == 200


def test_a_waiting_job_of_the_teacher_has_a_time_of_its_own(taught: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    taught.runner.service_s = lambda params: 40.0 if params.teacher else 2.5
    begin(taught, f"wait {gate}")
    slow, quick = begin(taught, "b", model="base"), begin(taught, "c")
    assert job_of(taught, slow)["eta_s"] >= 40.0 > job_of(taught, quick)["eta_s"]
    gate.touch()
