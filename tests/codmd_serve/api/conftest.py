"""The application around a worker process with a fake engine, spoken to over HTTP."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from codmd_serve import pool as pool_module
from codmd_serve.api.app import create_app
from codmd_serve.config import ServeConfig
from codmd_serve.dispatcher import Dispatcher

Serve = Callable[..., AbstractContextManager[TestClient]]


@pytest.fixture
def serve(tmp_path: Path, fake_worker: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Start a server with the settings given; its workers keep their memory in tmp_path (see fake_worker.py)."""
    monkeypatch.setattr(pool_module, "MAX_BACKOFF_S", 0.01)

    @contextmanager
    def started(is_ready: bool = True, **settings: Any) -> Iterator[TestClient]:
        app = create_app(Dispatcher(ServeConfig(bundle=str(tmp_path), **settings), fake_worker))
        with TestClient(app, raise_server_exceptions=False) as client:
            while is_ready and client.get("/ready").status_code != 200:
                pass
            yield client

    return started


@pytest.fixture
def client(serve: Serve) -> Iterator[TestClient]:
    """A ready server with the settings it has by default."""
    with serve() as client:
        yield client
