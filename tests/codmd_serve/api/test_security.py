"""Who may ask for what: keys, own jobs only, shares, rates, Host and Origin."""

import base64
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from http_tests import ASYNC, begin, post, refusal, until

from codmd_serve.api.security import HostCheck, Rates, allowed_names, host_name, read_keys
from codmd_serve.config import ServeConfig
from codmd_serve.errors import ConfigError

Serve = Callable[..., AbstractContextManager[TestClient]]
KEYS = {name: hashlib.sha256(f"key of {name}".encode()).hexdigest() for name in ("alice", "bob")}
ALICE, BOB = ({"Authorization": f"Bearer key of {name}"} for name in KEYS)


# keys


def test_without_a_key_nothing_but_probes_is_answered(serve: Serve) -> None:
    with serve(keys=KEYS) as client:
        for method, path in (
            ("POST", "/generate"),
            ("GET", "/jobs"),
            ("GET", "/jobs/x"),
            ("DELETE", "/jobs/x"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/docs"),
            ("GET", "/nowhere"),
            ("HEAD", "/jobs"),
        ):
            answer = client.request(method, path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            if method != "HEAD":
                refusal(answer, 401, "unauthorized")
        assert client.get("/health").status_code == client.get("/ready").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        ALICE,
        {"X-API-Key": "key of alice"},
        {"Authorization": "Basic " + base64.b64encode(b"anybody:key of alice").decode()},
    ],
)
def test_a_key_is_taken_in_three_forms(serve: Serve, headers: dict[str, str]) -> None:
    with serve(keys=KEYS) as client:
        assert post(client, "a", headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer key of carol"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer " + KEYS["alice"]},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Digest key of alice"},
        {"X-API-Key": ""},
        {"X-API-Key": "KEY OF ALICE"},
    ],
)
def test_anything_else_is_no_key(serve: Serve, headers: dict[str, str]) -> None:
    with serve(keys=KEYS) as client:
        refusal(post(client, "a", headers), 401, "unauthorized")


def test_each_key_sees_its_own_jobs_only(serve: Serve) -> None:
    with serve(keys=KEYS) as client:
        job_id = begin(client, "a private matter", ALICE)
        until(lambda: client.get(f"/jobs/{job_id}", headers=ALICE).json()["status"] == "completed")
        for path in ("/jobs/{}", "/jobs/{}/video", "/jobs/{}/events", "/v1/videos/{}", "/v1/videos/{}/content"):
            assert client.get(path.format(job_id), headers=ALICE).status_code == 200
            refusal(client.get(path.format(job_id), headers=BOB), 404, "not_found")
        for path in ("/jobs/{}", "/v1/videos/{}"):
            refusal(client.delete(path.format(job_id), headers=BOB), 404, "not_found")
        assert client.get("/jobs", headers=BOB).json()["jobs"] == []
        assert client.get("/v1/videos", headers=BOB).json()["data"] == []
        refusal(client.get("/jobs", params={"after": job_id}, headers=BOB), 422, "invalid_request")
        assert [job["id"] for job in client.get("/jobs", headers=ALICE).json()["jobs"]] == [job_id]


def test_a_key_has_its_share_of_the_queue(serve: Serve, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with serve(keys=KEYS, queue_size=4, key_share_percent=50) as client:
        running = begin(client, f"wait {gate}", ALICE)
        until(lambda: client.get(f"/jobs/{running}", headers=ALICE).json()["status"] == "running")
        begin(client, "1", ALICE)
        begin(client, "2", ALICE)
        refused = post(client, "3", {**ALICE, **ASYNC})
        refusal(refused, 429, "quota_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        begin(client, "3", BOB)
        gate.touch()


def test_a_key_has_its_rate(serve: Serve) -> None:
    with serve(keys=KEYS, key_jobs_per_minute=2) as client:
        for prompt in ("a", "b"):
            assert post(client, prompt, ALICE).status_code == 200
        refused = post(client, "c", ALICE)
        assert 1 <= int(refused.headers["retry-after"]) <= 31
        refusal(refused, 429, "rate_limited")
        refusal(client.post("/v1/videos", json={"prompt": "c"}, headers=ALICE), 429, "rate_limited")
        assert post(client, "c", BOB).status_code == 200


def test_without_keys_there_is_neither_share_nor_rate(serve: Serve) -> None:
    with serve(key_jobs_per_minute=1, key_share_percent=1) as client:
        for number in range(5):
            assert post(client, str(number)).status_code == 200


def test_a_bucket_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("codmd_serve.api.security.time.monotonic", lambda: now[0])
    rates = Rates(60)
    assert [rates.take("a") for _ in range(60)] == [0.0] * 60
    assert rates.take("a") == pytest.approx(1.0) and rates.take("b") == 0.0
    now[0] += 1.5
    assert rates.take("a") == 0.0 and rates.take("a") == pytest.approx(0.5)


def test_a_file_of_keys_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# who may\nalice {KEYS['alice']}\n\nbob\t{KEYS['bob']}  # since May\n")
    assert read_keys(str(path)) == KEYS
    assert read_keys("") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no key"),
        ("alice key", "line 1 of .* must be a new name and the SHA-256"),
        (f"alice {'a' * 64}\nalice {'b' * 64}", "line 2 of"),
        (f"al ice {'a' * 64}", "line 1 of"),
        (f"alice {'A' * 64}", "line 1 of"),
        (None, "cannot be read: No such file"),
        (b"a\n\xff", "is not UTF-8 text: line 2 holds the byte 0xff"),
    ],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=message):
        read_keys(str(path))


# Host and Origin


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5"])
def test_own_names_and_addresses_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "a@localhost", "", "x/y"],
)
def test_other_names_are_refused_on_every_route(client: TestClient, host: str) -> None:
    """S11: a web site that lets its name resolve to this machine."""
    for path in ("/health", "/jobs", "/docs", "/nowhere"):
        refusal(client.get(path, headers={"host": host}), 421, "host_not_allowed")
    refusal(client.post("/generate", json={"prompt": "a"}, headers={"host": host}), 421, "host_not_allowed")


def test_configured_names_are_answered(serve: Serve) -> None:
    with serve(allowed_hosts="videos.example, Other.example") as client:
        for host in ("videos.example", "other.example:443", "OTHER.EXAMPLE"):
            assert client.get("/health", headers={"host": host}).status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 421
    with serve(allowed_hosts="*") as client:
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 200


def test_a_wider_bind_answers_to_the_names_of_the_machine() -> None:
    import socket

    wide = ServeConfig(host="0.0.0.0", allow_remote_without_auth=True)
    assert socket.gethostname().lower() in allowed_names(wide)
    assert socket.gethostname().lower() not in allowed_names(ServeConfig()) or socket.gethostname() == "localhost"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://", "http://["]
)
def test_requests_of_other_sites_change_nothing(client: TestClient, origin: str) -> None:
    headers = {"origin": origin}
    refusal(post(client, "a", headers), 403, "forbidden")
    refusal(client.post("/v1/videos", data={"prompt": "a"}, headers=headers), 403, "forbidden")
    refusal(client.delete("/jobs/x", headers=headers), 403, "forbidden")
    assert client.get("/jobs").json()["jobs"] == []
    assert client.get("/health", headers=headers).status_code == 200


def test_requests_of_our_own_page_are_taken(client: TestClient) -> None:
    assert post(client, "a", {"origin": "http://localhost:8000"}).status_code == 200
    assert post(client, "a", {"origin": "http://127.0.0.1:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("a.example:80", "a.example"),
        ("[::1]:80", "::1"),
        ("A.Example", "a.example"),
        ("[", None),
        ("a@b", None),
        ("a/b", None),
    ],
)
def test_the_name_in_a_host_header(host: str, name: str | None) -> None:
    assert host_name(host) == name


def test_two_host_headers_are_refused() -> None:
    import asyncio

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> Any:
        raise AssertionError("reached the application")

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost"), (b"host", b"evil")]}
    asyncio.run(HostCheck(never, frozenset({"localhost"}))(scope, never, send))
    assert sent[0]["status"] == 421


def test_listening_widely_needs_keys_or_the_words() -> None:
    with pytest.raises(ConfigError, match="--api-keys, or say --allow-remote-without-auth"):
        ServeConfig(host="0.0.0.0")
    assert ServeConfig(host="0.0.0.0", api_keys="keys").host == "0.0.0.0"
    assert ServeConfig(host="0.0.0.0", allow_remote_without_auth=True).host == "0.0.0.0"
