"""Carries events between processes of one PostgreSQL store by LISTEN and NOTIFY. Does nothing on SQLite."""

import asyncio
import contextlib
import json
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from codmd_serve.errors import CodmdError
from codmd_serve.jobs.database import Database
from codmd_serve.jobs.events import EventHub
from codmd_serve.jobs.rows import CHANGED_CHANNEL, PROGRESS_CHANNEL

MAX_PAYLOAD_BYTES = 7900  # PostgreSQL takes less than 8,000
RECONNECT_S = 2.0
QUEUE_SIZE = 1000

logger = logging.getLogger(__name__)


class Listener:
    """Two threads, one for each direction.

    Args:
        database: that is listened to.
        hub: whose events are carried, and which hears those of others.
        on_change: called on the event loop with (job id, status or "cancel") when the store changed anywhere.
    """

    def __init__(self, database: Database, hub: EventHub, on_change: Callable[[str, str], None]) -> None:
        self.database = database
        self.hub = hub
        self.on_change = on_change
        self._is_stopping = threading.Event()
        self._outbox: queue.Queue[str] = queue.Queue(QUEUE_SIZE)
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start listening; call on the event loop."""
        if not self.database.is_postgres:
            return
        loop = asyncio.get_running_loop()
        self.hub.on_publish = self._put
        targets: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...] = ((self._listen, (loop,)), (self._send, ()))
        for target, arguments in targets:
            thread = threading.Thread(target=target, args=arguments, daemon=True, name="codmd-notify")
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._is_stopping.set()
        self.hub.on_publish = None
        for thread in self._threads:
            thread.join(timeout=5.0)

    def _put(self, job_id: str, kind: str, data: dict[str, Any]) -> None:
        event = {"from": self.hub.epoch, "id": job_id, "kind": kind, "data": data}
        payload = json.dumps(event)
        if len(payload) > MAX_PAYLOAD_BYTES:  # previews of large videos stay in this process
            payload = json.dumps(event | {"data": {key: data[key] for key in data if key != "preview"}})
        with contextlib.suppress(queue.Full):  # progress may be lost, states are in the store
            self._outbox.put_nowait(payload)

    def _send(self) -> None:
        while not self._is_stopping.is_set():
            with contextlib.suppress(queue.Empty, CodmdError):
                payload = self._outbox.get(timeout=0.5)
                with self.database.write() as connection:
                    self.database.notify(connection, PROGRESS_CHANNEL, payload)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        import psycopg

        url = self.database.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        while not self._is_stopping.is_set():
            try:
                with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
                    connection.execute(f"LISTEN {CHANGED_CHANNEL}".encode())
                    connection.execute(f"LISTEN {PROGRESS_CHANNEL}".encode())
                    while not self._is_stopping.is_set():
                        for notice in connection.notifies(timeout=0.5):
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
