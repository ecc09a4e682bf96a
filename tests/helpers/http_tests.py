"""What the HTTP tests share: waiting with a deadline, posting, and the one shape of a refusal."""

import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 120.0
ASYNC = {"Prefer": "respond-async"}


def until(is_true: Callable[[], Any], what: str = "it never happened") -> Any:
    """Wait until something is true; returns it."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (value := is_true()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.005)
    return value


def post(client: Any, prompt: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return client.post("/generate", json={"prompt": prompt, **body}, headers=headers)


def begin(client: Any, prompt: str, headers: dict[str, str] | None = None, **body: Any) -> str:
    """Send a job without waiting for it; its id."""
    answer = post(client, prompt, {**ASYNC, **(headers or {})}, **body)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def job_of(client: Any, job_id: str) -> Any:
    return client.get(f"/jobs/{job_id}").json()


def status_is(client: Any, job_id: str, *statuses: str) -> Any:
    """Wait until a job has one of these; the job."""
    return until(lambda: job if (job := job_of(client, job_id))["status"] in statuses else None, str(statuses))


def refusal(answer: Any, status: int, code: str) -> str:
    """The sentence of an answer that is not a success."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"code", "message", "field"}
    assert error["code"] == code
    message: str = error["message"]
    assert "\n" not in message and 0 < len(message) < 300 and "Traceback" not in message
    return message
