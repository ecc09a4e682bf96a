"""Events of one process at the listeners of another, on one SQLite file and on PostgreSQL."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codmd_serve.config import GenerateParams
from codmd_serve.jobs import listener as listener_module
from codmd_serve.jobs.database import open_database
from codmd_serve.jobs.events import EventHub
from codmd_serve.jobs.listener import Listener
from codmd_serve.jobs.states import Job, NewJob
from codmd_serve.jobs.store import JobStore, QueueLimits

DEADLINE_S = 60.0
PARAMS = GenerateParams(prompt="a", seed=1, height=64, width=64, num_frames=17, fps=16, crf=18)


class Side:
    """One process of a store: its hub, and the changes that it was told of."""

    def __init__(self, address: str) -> None:
        self.database = open_database(address)
        self.hub = EventHub()
        self.changes: list[tuple[str, str]] = []
        self.listener = Listener(self.database, self.hub, lambda *change: self.changes.append(change))
        self.listener.start()

    def close(self) -> None:
        self.listener.stop()
        self.database.close()


def between_two(address: str, story: Callable[[Side, Side], Any]) -> None:
    async def main() -> None:
        here, there = Side(address), Side(address)
        try:
            await asyncio.wait_for(story(here, there), DEADLINE_S)
        finally:
            await asyncio.to_thread(here.close)
            await asyncio.to_thread(there.close)

    asyncio.run(main())


async def until(is_true: Callable[[], object]) -> None:
    while not is_true():
        await asyncio.sleep(0.01)


def test_progress_and_previews_reach_another_process(store_address: str) -> None:
    async def story(here: Side, there: Side) -> None:
        channel = there.hub.channel("j")
        picture = "data:image/webp;base64," + "A" * 3000
        while not channel.events:  # PostgreSQL: until it listens
            here.hub.started("j", 1)
            here.hub.progressed("j", "denoise", 2, 4, picture)
            await asyncio.sleep(0.05)
        await until(lambda: channel.step == 2)
        (step,) = [event for event in channel.events if event.kind == "step"][:1]
        assert step.data["preview"] == picture and channel.stage == "denoise"

    between_two(store_address, story)


def test_a_new_job_and_a_cancellation_are_heard_at_once(store_address: str) -> None:
    async def story(here: Side, there: Side) -> None:
        store = JobStore(here.database)
        job: Job | None = None
        while not there.changes:
            new = NewJob(params=PARAMS, bundle="b", content_key="k")
            job, _ = await asyncio.to_thread(store.submit, new, QueueLimits(queue_size=10_000))
            await asyncio.sleep(0.05)
        assert job is not None
        await asyncio.to_thread(store.cancel, job.id)
        await until(lambda: (job.id, "cancelled") in there.changes)
        assert (job.id, "queued") in there.changes

    between_two(store_address, story)


def test_where_there_are_no_sockets_states_are_polled(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def refuse(folder: Path) -> Any:
        raise OSError("no sockets here")

    monkeypatch.setattr(listener_module, "LocalBus", refuse)

    async def main() -> None:
        side = Side(str(tmp_path / "jobs.sqlite3"))
        side.hub.started("j", 1)
        side.close()

    asyncio.run(main())
    assert "no events from other processes: no sockets here" in caplog.text
