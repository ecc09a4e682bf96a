"""What /metrics of a server, and the metrics port of a worker machine, say of jobs that were run."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from http_tests import post, until
from processes import Process, ServerProcess, free_port
from processes import until as until_processes
from prometheus_client.parser import text_string_to_metric_families

from codmd_serve.api.metrics import Metrics, serve_metrics
from codmd_serve.errors import ConfigError, StoreError

Serve = Callable[..., AbstractContextManager[TestClient]]


def samples(text: str) -> dict[str, float]:
    """Values by name and sorted labels, as `codmd_jobs_total{code="",status="completed"}`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def read(client: Any) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return samples(answer.text)


def test_jobs_are_counted_by_outcome_code_and_source(client: TestClient) -> None:
    for prompt in ("a", "a", "oom"):
        post(client, prompt, seed=1)
    found = until(
        lambda: now if (now := read(client)).get('codmd_jobs_total{code="out_of_memory",status="failed"}') else None
    )
    assert found['codmd_jobs_total{code="",status="completed"}'] == 1
    assert found['codmd_submissions_total{source="engine"}'] == 2
    assert found['codmd_submissions_total{source="store"}'] == 1, "a cache hit"
    assert found['codmd_errors_total{code="out_of_memory"}'] == 1


def test_stages_and_totals_are_histograms_with_buckets_for_ms_and_for_hours(client: TestClient) -> None:
    post(client, "a")
    found = read(client)
    for stage in ("queue", "denoise", "decode"):
        assert found[f'codmd_stage_seconds_count{{stage="{stage}"}}'] == 1
    assert found["codmd_job_seconds_count"] == 1 and 'codmd_job_seconds_bucket{le="0.01"}' in found
    bounds = sorted(float(name.split('"')[1]) for name in found if name.startswith("codmd_job_seconds_bucket"))
    assert bounds[0] <= 0.01 and bounds[-2] >= 2500 and len(bounds) < 20


def test_queue_workers_restarts_and_execution_are_read_when_somebody_asks(client: Any) -> None:
    client.runner.restarts["stalled"] = 2
    found = read(client)
    assert found["codmd_ready"] == 1 and found["codmd_workers"] == 1 and found["codmd_workers_hanging"] == 0
    assert found["codmd_queue_depth"] == 0 and found["codmd_queue_limit"] == 16 and found["codmd_store_up"] == 1
    assert found["codmd_unserved"] == 0
    assert found['codmd_worker_restarts_total{reason="stalled"}'] == 2
    assert found['codmd_worker_restarts_total{reason="died"}'] == 0, "before the first, so that a rate sees it"
    info = next(name for name in found if name.startswith("codmd_execution_info"))
    assert 'execution="eager"' in info and 'model="fake"' in info and 'fallback="false"' in info
    assert found["codmd_native_video_seconds"] == 2.5 and found["process_open_fds"] > 0
    client.runner.is_ready = False
    assert read(client)["codmd_ready"] == 0


def test_a_store_that_does_not_answer_is_said_and_its_queue_is_not_invented(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise StoreError("gone")

    monkeypatch.setattr(client.backend.store, "queue", broken)
    found = until(lambda: now if (now := read(client))["codmd_store_up"] == 0 else None)
    assert "codmd_queue_depth" not in found and found["codmd_ready"] == 0


def test_labels_hold_no_prompt_id_or_key(serve: Serve) -> None:
    key = "k" * 40
    with serve(keys={"alice": hashlib.sha256(key.encode()).hexdigest()}) as client:
        client.headers["authorization"] = f"Bearer {key}"
        answer = post(client, "a very secret prompt")
        job_id = answer.headers["content-location"].rpartition("/")[2]
        text = client.get("/metrics").text
        assert "codmd_jobs_total" in text
        assert "secret" not in text and job_id not in text and "alice" not in text and key not in text


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[tuple[ServerProcess, Process, str]]:
    """An API alone and a worker machine with a metrics port, on one store, with the fake engine."""
    port = free_port()
    server = ServerProcess(tmp_path, tmp_path / "data", "--workers", "0")
    words = ("work", "--bundle", str(tmp_path), "--data", str(tmp_path / "data"), "--metrics-port", str(port))
    worker = Process(tmp_path, *words)
    try:
        server.start()
        worker.start()
        yield server, worker, f"http://127.0.0.1:{port}/metrics"
    finally:
        worker.end()
        server.end()


def test_a_worker_machine_has_metrics_of_its_own(processes: tuple[ServerProcess, Process, str]) -> None:
    server, worker, address = processes
    until_processes(lambda: server.answers("/ready"), worker.said)
    server.status_is(server.submit("a"), "completed")
    found = samples(httpx.get(address, trust_env=False).text)
    assert found['codmd_jobs_total{code="",status="completed"}'] == 1 and found["codmd_workers"] == 1
    assert found['codmd_stage_seconds_count{stage="denoise"}'] == 1 and found["codmd_store_up"] == 1
    assert samples(server.client.get("/metrics").text)['codmd_submissions_total{source="engine"}'] == 1
    assert worker.stop() == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(address, trust_env=False)


def test_a_metrics_port_that_is_taken_is_one_sentence() -> None:
    stop = serve_metrics(Metrics(), "127.0.0.1", port := free_port())
    try:
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port} for metrics: .*--metrics-port"):
            serve_metrics(Metrics(), "127.0.0.1", port)
    finally:
        stop()
