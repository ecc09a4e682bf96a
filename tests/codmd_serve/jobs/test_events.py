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
