"""The application on a store of its own, with a runner in this process, spoken to over HTTP."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runner import FACTS, FakeRunner
from fastapi.testclient import TestClient

from codmd_serve.api.app import create_app
from codmd_serve.api.backend import Backend, Own
from codmd_serve.config import ServeConfig
from codmd_serve.serving import Parts, make_dispatcher

Serve = Callable[..., AbstractContextManager[TestClient]]
OWN = Own("b" * 64, "fake", "e" * 64, FACTS)


def make_backend(config: ServeConfig, runner: FakeRunner | None, own: Own = OWN) -> tuple[Backend, Any]:
    """A backend with that runner, or none, and its metrics."""
    parts = Parts.open(config)
    dispatcher = None if runner is None else make_dispatcher(config, parts, own, runner)
    here = own if runner is not None else None
    return Backend(config, parts.database, parts.results, parts.hub, here, dispatcher), parts.metrics


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Start a server with the settings given. `client.runner` is its runner; none runs when it `is_alone`."""

    @contextmanager
    def started(
        is_ready: bool = True,
        keys: dict[str, str] | None = None,
        own: Own = OWN,
        is_alone: bool = False,
        **settings: Any,
    ) -> Iterator[TestClient]:
        settings.setdefault("data", str(tmp_path / "data"))
        config = replace(ServeConfig(bundle=str(tmp_path)), **settings)
        runner = asyncio.run(_made())
        runner.is_ready = is_ready
        if not is_ready:
            runner.facts = None
        backend, metrics = make_backend(config, None if is_alone else runner, own)
        app = create_app(backend, metrics, keys)
        with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
            client.runner = runner  # type: ignore[attr-defined]
            client.backend = backend  # type: ignore[attr-defined]
            yield client

    return started


async def _made() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def client(serve: Serve) -> Iterator[TestClient]:
    """A ready server with the settings it has by default."""
    with serve() as client:
        yield client
