"""Carries events between the processes of one store: by LISTEN and NOTIFY on PostgreSQL, by local sockets on SQLite."""

import asyncio
import contextlib
import json
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codmd_serve.errors import CodmdError
from codmd_serve.jobs.database import Database
from codmd_serve.jobs.events import EventHub
from codmd_serve.jobs.local_bus import BUFFER_BYTES, LocalBus
from codmd_serve.jobs.rows import CHANGED_CHANNEL, PROGRESS_CHANNEL

MAX_NOTIFY_BYTES = 7900  # PostgreSQL takes less than 8,000
MAX_LOCAL_BYTES = BUFFER_BYTES - 1000
RECONNECT_S = 2.0
POLL_S = 0.5
QUEUE_SIZE = 1000

logger = logging.getLogger(__name__)


class Listener:
    """Two threads, one for each direction.

    What is lost is progress, or a second: states are in the store, and everybody polls it.

    Args:
        database: that is listened to.
        hub: whose events are carried, and which hears those of others.
        on_change: called on the event loop with (job id, status or "cancel") when the store changed elsewhere.
    """

    def __init__(self, database: Database, hub: EventHub, on_change: Callable[[str, str], None]) -> None:
        self.database = database
        self.hub = hub
        self.on_change = on_change
        self._bus: LocalBus | None = None
        self._is_stopping = threading.Event()
        self._outbox: queue.Queue[tuple[str, str]] = queue.Queue(QUEUE_SIZE)
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start listening; call on the event loop."""
        loop = asyncio.get_running_loop()
        listen: Callable[[asyncio.AbstractEventLoop], None] = self._listen_postgres
        if not self.database.is_postgres:
            try:
                store = Path(self.database.name)
                self._bus = LocalBus(store.with_name(f"events-{store.name}"))
            except (OSError, AttributeError) as error:  # a system or a disk without such sockets
                logger.warning("store=%s no events from other processes: %s", self.database.name, error)
                return
            self.database.on_notice = self._put
            listen = self._listen_local
        self.hub.on_publish = self._put_event
        targets: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...] = ((listen, (loop,)), (self._send, ()))
        for target, arguments in targets:
            thread = threading.Thread(target=target, args=arguments, daemon=True, name="codmd-notify")
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._is_stopping.set()
        self.hub.on_publish = None
        self.database.on_notice = None
        for thread in self._threads:
            thread.join(timeout=5.0)
        if self._bus is not None:
            self._bus.close()
            self._bus = None

    def _put_event(self, job_id: str, kind: str, data: dict[str, Any]) -> None:
        event = {"from": self.hub.epoch, "id": job_id, "kind": kind, "data": data}
        payload = json.dumps(event)
        if len(payload) > (MAX_NOTIFY_BYTES if self._bus is None else MAX_LOCAL_BYTES):
            # Previews of large videos stay in this process.
            payload = json.dumps(event | {"data": {key: data[key] for key in data if key != "preview"}})
        self._put(PROGRESS_CHANNEL, payload)

    def _put(self, channel: str, payload: str) -> None:
        with contextlib.suppress(queue.Full):
            self._outbox.put_nowait((channel, payload))

    def _send(self) -> None:
        while not self._is_stopping.is_set():
            with contextlib.suppress(queue.Empty, CodmdError, OSError):
                channel, payload = self._outbox.get(timeout=POLL_S)
                if self._bus is not None:
                    self._bus.send(f"{channel} {payload}".encode())
                else:
                    with self.database.write() as connection:
                        self.database.notify(connection, channel, payload)

    def _listen_local(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._bus is not None
        while not self._is_stopping.is_set():
            try:
                message = self._bus.receive(POLL_S)
                if message is not None:
                    channel, _, payload = message.decode().partition(" ")
                    loop.call_soon_threadsafe(self._hear, channel, payload)
            except (OSError, RuntimeError):  # the socket was closed, or the event loop has ended
                return

    def _listen_postgres(self, loop: asyncio.AbstractEventLoop) -> None:
        import psycopg

        url = self.database.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        while not self._is_stopping.is_set():
            try:
                with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
                    connection.execute(f"LISTEN {CHANGED_CHANNEL}".encode())
                    connection.execute(f"LISTEN {PROGRESS_CHANNEL}".encode())
                    while not self._is_stopping.is_set():
                        for notice in connection.notifies(timeout=POLL_S):
                            loop.call_soon_threadsafe(self._hear, notice.channel, notice.payload)
            except psycopg.Error as error:
                logger.warning("store=%s listening failed, polling meanwhile: %s", self.database.name, error)
                self._is_stopping.wait(RECONNECT_S)
            except RuntimeError:  # the event loop has ended
                return

    def _hear(self, channel: str, payload: str) -> None:
        event = json.loads(payload)
        if channel == CHANGED_CHANNEL:
            self.hub.wake(event["id"])
            self.on_change(event["id"], event["status"])
        elif event["from"] != self.hub.epoch:
            self.hub.hear(event["id"], event["kind"], event["data"])
