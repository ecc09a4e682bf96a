"""Progress of jobs, from the engine to whoever listens; in memory only. Lives on one event loop.

What is durable is in the store. A hub that never heard of a job knows nothing about it, and listeners poll the store.
"""

import asyncio
import contextlib
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

EVENTS_KEPT = 256
CHANNELS_KEPT = 1000
KEPT_WHEN_FINAL_S = 60.0  # for who reconnects; the store knows the end
FINAL_KINDS = ("done", "failed", "cancelled", "expired")
# Where each stage begins and how much of the whole it is, roughly, for a bar that moves.
STAGE_PROGRESS = {"text": (0.0, 0.05), "denoise": (0.05, 0.65), "decode": (0.7, 0.25), "encode": (0.95, 0.05)}


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One message of an event stream.

    Attributes:
        number: counts up within a job.
        kind: queued, started, text, step, decoding, encoding, done, failed, cancelled or expired.
        data: JSON object.
    """

    number: int
    kind: str
    data: dict[str, Any]


@dataclass(slots=True, eq=False)
class Channel:
    """What is heard of one job.

    Attributes:
        events: the newest, in order.
        stage, step, num_steps: where the job is; empty and 0 before it starts.
        progress: 0..1, in all.
        num_listeners: clients that wait for the job.
        version: counts the events and wakes. Who reads the store first notes it, and sees by it what came meanwhile.
    """

    events: deque[JobEvent] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    stage: str = ""
    step: int = 0
    num_steps: int = 0
    progress: float = 0.0
    num_listeners: int = 0
    version: int = 0
    _count: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, kind: str, data: dict[str, Any]) -> None:
        """Append an event, unless it says nothing new or comes after the end, as one of another process may."""
        if self.events:
            newest = self.events[-1]
            if newest.kind in FINAL_KINDS and kind not in FINAL_KINDS:
                return
            if newest.kind == kind and newest.data == data:
                return
        self._count += 1
        self.events.append(JobEvent(self._count, kind, data))
        self.wake()

    def wake(self) -> None:
        """Let everybody look again."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, since: int, timeout_s: float) -> None:
        """Return when there is a later version than `since`, or after `timeout_s`."""
        if self.version != since:
            return
        changed = self._changed
        # Not wait_for: in Python 3.11 it can swallow a cancellation that comes together with the event.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()


class EventHub:
    """Channels by job id.

    Attributes:
        epoch: of this process; event ids of another one mean nothing here.
        on_publish: called with (job id, kind, data) of every event that begins here, to carry it to other processes.
    """

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(4)
        self.on_publish: Callable[[str, str, dict[str, Any]], None] | None = None
        self._channels: OrderedDict[str, Channel] = OrderedDict()

    def channel(self, job_id: str) -> Channel:
        """The channel of a job, made when it is new."""
        channel = self._channels.get(job_id)
        if channel is None:
            channel = self._channels[job_id] = Channel()
            idle = [key for key, each in self._channels.items() if not each.num_listeners and each is not channel]
            for key in idle[: max(0, len(self._channels) - CHANNELS_KEPT)]:
                del self._channels[key]
        return channel

    def known(self, job_id: str) -> Channel | None:
        return self._channels.get(job_id)

    def forget(self, job_id: str) -> None:
        """Drop the events of a job that nobody listens to."""
        channel = self._channels.get(job_id)
        if channel is not None and not channel.num_listeners:
            del self._channels[job_id]

    @contextlib.contextmanager
    def listening(self, job_id: str) -> Iterator[Channel]:
        """Keep a channel while a client waits for the job."""
        channel = self.channel(job_id)
        channel.num_listeners += 1
        try:
            yield channel
        finally:
            channel.num_listeners -= 1

    def publish(self, job_id: str, kind: str, data: dict[str, Any], is_own: bool = True) -> None:
        """Tell the listeners of a job, here and (`is_own`) in other processes."""
        channel = self.channel(job_id)
        channel.add(kind, data)
        if kind in FINAL_KINDS:
            with contextlib.suppress(RuntimeError):  # no event loop: a test, or the end of the process
                asyncio.get_running_loop().call_later(KEPT_WHEN_FINAL_S, self.forget, job_id)
        if is_own and self.on_publish is not None:
            self.on_publish(job_id, kind, data)

    def started(self, job_id: str, attempt: int) -> None:
        channel = self.channel(job_id)
        channel.stage, channel.step, channel.progress = "", 0, 0.0
        self.publish(job_id, "started", {"attempt": attempt})

    def progressed(self, job_id: str, stage: str, done: int, total: int, preview: str = "") -> None:
        """Take in one progress message of the engine."""
        data: dict[str, Any] = {"done": done, "total": total}
        kind = {"denoise": "step", "decode": "decoding", "encode": "encoding"}.get(stage, stage)
        if kind == "step":
            data = {"step": done, "num_steps": total}
        elif kind in ("decoding", "encoding"):
            data = {"frames": done, "num_frames": total}
        self._place(job_id, stage, done, total)
        data["progress"] = round(self.channel(job_id).progress, 3)
        self.publish(job_id, kind, data | ({"preview": preview} if preview else {}))

    def hear(self, job_id: str, kind: str, data: dict[str, Any]) -> None:
        """Take in an event of another process."""
        stage = {"step": "denoise", "decoding": "decode", "encoding": "encode"}.get(kind, kind)
        done = data.get("step", data.get("frames", data.get("done", 0)))
        total = data.get("num_steps", data.get("num_frames", data.get("total", 0)))
        if kind == "started":
            channel = self.channel(job_id)
            channel.stage, channel.step, channel.progress = "", 0, 0.0
        elif stage in STAGE_PROGRESS and total:
            self._place(job_id, stage, done, total)
        self.publish(job_id, kind, data, is_own=False)

    def _place(self, job_id: str, stage: str, done: int, total: int) -> None:
        channel = self.channel(job_id)
        begin, share = STAGE_PROGRESS.get(stage, (channel.progress, 0.0))
        channel.stage, channel.progress = stage, begin + share * done / max(1, total)
        if stage == "denoise":
            channel.step, channel.num_steps = done, total

    def wake(self, job_id: str) -> None:
        """Let listeners of a job look at the store again."""
        channel = self._channels.get(job_id)
        if channel is not None:
            channel.wake()

    def wake_all(self) -> None:
        """Let everybody look at the store again."""
        for channel in self._channels.values():
            channel.wake()
