"""A job store of each kind, and dispatchers' sides of it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from stores import postgres as postgres
from stores import store_address as store_address

from codmd_serve.config import GenerateParams
from codmd_serve.jobs.database import Database, open_database
from codmd_serve.jobs.leases import Leases
from codmd_serve.jobs.rows import content_key
from codmd_serve.jobs.states import Job, NewJob
from codmd_serve.jobs.store import JobStore, QueueLimits

PARAMS = GenerateParams(prompt="a red circle", seed=1, height=64, width=64, num_frames=17, fps=16, crf=18)
LIMITS = QueueLimits(queue_size=100)


@pytest.fixture
def database(store_address: str) -> Iterator[Database]:
    database = open_database(store_address)
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def submit(store: JobStore) -> Callable[..., Job]:
    """Submit a job of the bundle "b"; the prompt decides its content."""

    def submitted(
        prompt: str = "a", limits: QueueLimits = LIMITS, may_reuse: bool = True, teacher: str = "", **values: Any
    ) -> Job:
        params = replace(PARAMS, prompt=prompt, teacher=teacher)
        new = NewJob(params=params, bundle="b", content_key=content_key("b", "e", params), **values)
        return store.submit(new, limits, may_reuse)[0]

    return submitted


@pytest.fixture
def leases(database: Database) -> Callable[..., Leases]:
    """A dispatcher's side of the store."""

    def of(owner: str, **settings: Any) -> Leases:
        return Leases(database, owner, "b", "model-b", "e", **settings)

    return of
