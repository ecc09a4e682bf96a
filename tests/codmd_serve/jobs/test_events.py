"""Channels of the hub: what is heard of a job is kept while it runs, and for a while after its end."""

import asyncio

import pytest

from codmd_serve.jobs import events
from codmd_serve.jobs.events import EventHub


def test_a_finished_job_is_forgotten_unless_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by 2,000 jobs that nobody waited for: each left its events until 1,000 others had come."""
    monkeypatch.setattr(events, "KEPT_WHEN_FINAL_S", 0.01)

    async def story() -> None:
        hub = EventHub()
        for job_id in ("running", "heard", "over"):
            hub.started(job_id, 1)
        with hub.listening("heard"):
            for job_id in ("heard", "over"):
                hub.publish(job_id, "done", {"status": "completed"})
            async with asyncio.timeout(60.0):
                while hub.known("over") is not None:
                    await asyncio.sleep(0.001)
            assert hub.known("heard") is not None and hub.known("running") is not None

    asyncio.run(story())


def test_an_event_that_comes_after_the_end_is_not_told() -> None:
    """Another process may tell a step after the store was seen to hold the end."""
    hub = EventHub()
    hub.publish("a", "done", {"status": "completed"})
    hub.hear("a", "step", {"step": 4, "num_steps": 4, "progress": 0.7})
    hub.publish("a", "expired", {"status": "expired"})
    channel = hub.known("a")
    assert channel is not None and [event.kind for event in channel.events] == ["done", "expired"]


def test_a_listener_sees_what_came_while_it_read() -> None:
    async def story() -> None:
        channel = EventHub().channel("a")
        version = channel.version
        channel.add("step", {"step": 1})
        async with asyncio.timeout(60.0):
            await channel.changed(version, 3600.0)
            asyncio.get_running_loop().call_soon(channel.wake)
            await channel.changed(channel.version, 3600.0)
            version = channel.version
            await channel.changed(version, 0.001)
            assert channel.version == version, "nothing came"

    asyncio.run(story())
