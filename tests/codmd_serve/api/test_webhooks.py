"""Webhooks: what is allowed, what is public, signatures, redirects, retries."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from http_tests import begin, post, refusal, status_is, until
from sqlalchemy import func, select

from codmd_serve.api.webhooks import Webhooks, is_public, judge_url, read_secret
from codmd_serve.config import GenerateParams, ServeConfig
from codmd_serve.errors import ConfigError
from codmd_serve.jobs.database import Database
from codmd_serve.jobs.schema import webhooks_table
from codmd_serve.jobs.states import Job

Serve = Callable[..., AbstractContextManager[TestClient]]
SECRET = b"a secret of more than sixteen bytes"
PARAMS = GenerateParams(prompt="a", seed=3, height=64, width=64, num_frames=17, fps=16, crf=18)
JOB = Job(
    number=1,
    id="j1",
    owner="",
    status="completed",
    bundle="b",
    model="m",
    content_key="c",
    params=PARAMS,
    is_preview=False,
    is_detached=True,
    created_at=1.0,
    webhook_url="https://hook.example/done",
)


def config(tmp_path: Path, hosts: str = "*") -> ServeConfig:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET + b"\n")
    return ServeConfig(webhook_hosts=hosts, webhook_secret_file=str(secret))


def deliver(
    tmp_path: Path,
    answer: Callable[[httpx.Request], httpx.Response],
    addresses: dict[str, list[str]] | None = None,
    job: Job = JOB,
    hosts: str = "*",
) -> tuple[bool, list[httpx.Request]]:
    """Deliver with a fake network; whether it is done with, and what was sent."""
    seen: list[httpx.Request] = []

    async def resolve(name: str, _port: int) -> list[str]:
        return (addresses or {}).get(name, [name] if name[0].isdigit() else ["93.184.216.34"])

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answer(request)

    webhooks = Webhooks(config(tmp_path, hosts), SECRET, resolve, httpx.MockTransport(handle))
    return asyncio.run(webhooks.deliver(job)), seen


def test_a_webhook_is_signed_and_goes_to_the_address_that_was_judged(tmp_path: Path) -> None:
    is_done, (request,) = deliver(tmp_path, lambda _: httpx.Response(204))
    assert is_done
    assert request.url.host == "93.184.216.34" and request.headers["host"] == "hook.example"
    assert request.extensions["sni_hostname"] == "hook.example"
    body = json.loads(request.content)
    assert body == {"id": "j1", "status": "completed", "seed": 3, "error": None, "video": "/jobs/j1/video"}
    signed = request.headers["x-codmd-timestamp"].encode() + b"." + request.content
    wanted = "sha256=" + hmac.new(SECRET, signed, hashlib.sha256).hexdigest()
    assert request.headers["x-codmd-signature"] == wanted


def test_a_failed_job_tells_why(tmp_path: Path) -> None:
    job = replace(JOB, status="failed", error_code="out_of_memory", error_message="no room")
    _, (request,) = deliver(tmp_path, lambda _: httpx.Response(200), job=job)
    body = json.loads(request.content)
    assert body["error"] == {"code": "out_of_memory", "message": "no room"} and "video" not in body


@pytest.mark.parametrize("status", [500, 404, 400])
def test_what_is_not_taken_is_tried_again(tmp_path: Path, status: int) -> None:
    assert deliver(tmp_path, lambda _: httpx.Response(status))[0] is False


def test_a_network_that_fails_is_tried_again(tmp_path: Path) -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route", request=request)

    assert deliver(tmp_path, broken)[0] is False


def test_redirects_are_judged_anew(tmp_path: Path) -> None:
    def redirect(request: httpx.Request) -> httpx.Response:
        if request.headers["host"] == "hook.example":
            return httpx.Response(307, headers={"location": "https://inside.example/x"})
        return httpx.Response(200)

    is_done, seen = deliver(tmp_path, redirect)
    assert is_done and [request.headers["host"] for request in seen] == ["hook.example", "inside.example"]
    is_done, seen = deliver(tmp_path, redirect, {"inside.example": ["10.0.0.1"]})
    assert is_done and len(seen) == 1, "given up before a private address is asked"
    for target in ("http://hook.example/", "https://hook.example:8443/", "file:///etc/passwd", "https://127.0.0.1/"):
        is_done, seen = deliver(tmp_path, lambda _, to=target: httpx.Response(302, headers={"location": to}))  # type: ignore[misc]
        assert is_done and len(seen) == 1, target


def test_redirects_have_an_end(tmp_path: Path) -> None:
    is_done, seen = deliver(tmp_path, lambda _: httpx.Response(302, headers={"location": "https://hook.example/"}))
    assert is_done is False and len(seen) == 4


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::1"], []])
def test_a_name_that_leads_inside_is_never_called(tmp_path: Path, addresses: list[str]) -> None:
    is_done, seen = deliver(tmp_path, lambda _: httpx.Response(200), {"hook.example": addresses})
    assert is_done and seen == []


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("localhost", False),
    ],
)
def test_only_addresses_of_the_open_internet_are_public(address: str, wanted: bool) -> None:
    assert is_public(address) is wanted


@pytest.mark.parametrize(
    ("url", "hosts", "is_good"),
    [
        ("https://hook.example/x", "*", True),
        ("https://hook.example:443/x", "hook.example", True),
        ("https://a.hook.example/", "*.hook.example", True),
        ("https://hook.example/", "*.hook.example", False),
        ("https://evilhook.example/", "hook.example, *.hook.example", False),
        ("http://hook.example/", "*", False),
        ("https://hook.example:8443/", "*", False),
        ("https://user:word@hook.example/", "*", False),
        ("https:///x", "*", False),
        ("https://[", "*", False),
        ("https://hook.example/ x", "*", False),
        ("https://h\u00f6ok.example/", "*", False),
        ("https://hook.example/\0", "*", False),
    ],
)
def test_urls_are_judged_before_anything_is_looked_up(url: str, hosts: str, is_good: bool) -> None:
    assert (judge_url(url, hosts) == "") is is_good


def test_a_secret_is_needed_and_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--webhook-secret-file"):
        ServeConfig(webhook_hosts="*")
    assert read_secret(config(tmp_path)) == SECRET and read_secret(ServeConfig()) == b""
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="at least 16 bytes, got 5"):
        read_secret(ServeConfig(webhook_hosts="*", webhook_secret_file=str(tmp_path / "secret")))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_secret(ServeConfig(webhook_hosts="*", webhook_secret_file="/nowhere/secret"))


def test_webhooks_of_jobs_are_delivered_once(serve: Serve, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    with serve(webhook_hosts="hook.example", webhook_secret_file=str(secret)) as client:
        called: list[str] = []

        async def deliver_(job: Job) -> bool:
            called.append(f"{job.id} {job.status} {job.webhook_url}")
            return True

        client.backend.dispatcher.deliver = deliver_  # type: ignore[attr-defined]
        refusal(post(client, "a", webhook_url="https://other.example/"), 422, "invalid_request")
        job_id = begin(client, "a", webhook_url="https://hook.example/x")
        status_is(client, job_id, "completed")
        until(lambda: called)
        assert called == [f"{job_id} completed https://hook.example/x"]
        database = client.backend.store.database  # type: ignore[attr-defined]
        until(lambda: num_webhooks(database) == 0)


def num_webhooks(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(webhooks_table)).scalar_one())
