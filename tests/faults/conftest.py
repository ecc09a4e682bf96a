"""Servers with the fake engine on SQLite and on PostgreSQL, as processes that tests kill."""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import records
from processes import Process, ServerProcess
from stores import postgres as postgres
from stores import store_address as store_address


@pytest.fixture
def server(tmp_path: Path, store_address: str) -> Iterator[Callable[..., ServerProcess]]:
    """Make a server on the test's store; more words go to its command line."""
    yield from servers(tmp_path, store_address)


@pytest.fixture
def sqlite_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """The same where the kind of the store does not matter."""
    yield from servers(tmp_path, str(tmp_path / "jobs.sqlite3"))


def servers(folder: Path, store: str) -> Iterator[Callable[..., ServerProcess]]:
    made: list[Process] = []

    def make(*words: str, **settings: Any) -> ServerProcess:
        own = folder / f"server{len(made)}"
        own.mkdir()
        server = ServerProcess(own, folder / "data", "--store", store, *words, **settings)
        made.append(server)
        return server

    yield make
    for each in made:
        each.end()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add figures to what is known of this run of the test."""
    return lambda **figures: records.record(request.node.nodeid, figures)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker("faults"):
        records.begin(item.nodeid)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and item.get_closest_marker("faults"):
        records.end(item.nodeid, report.outcome, report.duration)
    return report
