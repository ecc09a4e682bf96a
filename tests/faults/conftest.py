"""Servers with the fake engine on SQLite and on PostgreSQL, as processes that tests kill."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Process, ServerProcess
from stores import postgres as postgres
from stores import store_address as store_address


@pytest.fixture
def server(tmp_path: Path, store_address: str) -> Iterator[Callable[..., ServerProcess]]:
    """Make a server on the test's store; more words go to its command line."""
    made: list[Process] = []

    def make(*words: str, **settings: Any) -> ServerProcess:
        folder = tmp_path / f"server{len(made)}"
        folder.mkdir()
        server = ServerProcess(folder, tmp_path / "data", "--store", store_address, *words, **settings)
        made.append(server)
        return server

    yield make
    for each in made:
        each.end()
