"""Connections around a request: deadlines for headers and for reading the answer, and a bound on how many are open.

A client that connects and says nothing, or sends its headers a byte at a time, holds a descriptor. uvicorn waits for
ever; here it gets `header_timeout_s`, and when all places are taken the one that was silent for longest makes room.
A client that does not read its answer is cut off: closing would wait for it to read what is left.
"""

import asyncio
import contextlib
import json
import logging
import resource
import time
from typing import Any, ClassVar, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

SPARE_DESCRIPTORS = 128  # for the store, workers, files
WARN_EVERY_S = 60.0

logger = logging.getLogger(__name__)


def connection_limit(asked: int) -> int:
    """Connections that may be open: as asked, if the system has descriptors for them. Raises the soft limit first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = asked + SPARE_DESCRIPTORS
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(asked, soft - SPARE_DESCRIPTORS))


class GuardedProtocol(H11Protocol):
    """One connection, with deadlines and a bound on how many there are.

    Attributes:
        max_connections, header_timeout_s: the limits; of the class.
        send_timeout_s: for the client to take what has been written, a chunk of a video at most; of the class.
        warned_s: when the log last said that there is no room; of the class.
        waits_since_s: when it last had nothing to answer.
    """

    max_connections: ClassVar[int] = 4096
    header_timeout_s: ClassVar[float] = 10.0
    warned_s: ClassVar[float] = -WARN_EVERY_S
    send_timeout_s: ClassVar[float] = 60.0
    waits_since_s: float = 0.0
    _header_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # The least that the system does not take at once starts the deadline of what is read.
        transport.set_write_buffer_limits(high=0)
        self._await_headers()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.send_timeout_s, self._on_send_timeout)

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._header_timer is None and not self.transport.is_closing():
            self._await_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.waits_since_s = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Whether it has no request that is being answered."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _await_headers(self) -> None:
        self.waits_since_s = time.monotonic()
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._on_header_timeout)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _on_send_timeout(self) -> None:
        self._send_timer = None
        logger.info("a client read nothing for %g s and was cut off", self.send_timeout_s)
        self.transport.abort()

    def _on_header_timeout(self) -> None:
        self._header_timer = None
        if self.is_idle and not self.transport.is_closing():
            if self.cycle is None:
                self.transport.write(_refusal(408, "Request Timeout", "request_timeout", "no whole request came"))
            self.transport.close()

    def _make_room(self) -> None:
        connections = cast("set[Any]", self.connections)
        idle = [each for each in connections if getattr(each, "is_idle", False) and each is not self]
        now_s = time.monotonic()
        if now_s - GuardedProtocol.warned_s > WARN_EVERY_S:
            GuardedProtocol.warned_s = now_s
            logger.warning("connections=%d limit=%d idle ones are closed", len(connections), self.max_connections)
        if idle:
            oldest = min(idle, key=lambda each: each.waits_since_s)
            connections.discard(oldest)
            oldest.transport.abort()
        else:
            self.transport.write(
                _refusal(503, "Service Unavailable", "too_many_connections", "too many connections are open")
            )
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._stop_timer()
        self.transport.write(_refusal(400, "Bad Request", "bad_request", "this is not an HTTP request"))
        self.transport.close()


def guarded_protocol(max_connections: int, header_timeout_s: float) -> type[asyncio.Protocol]:
    """A GuardedProtocol with limits, for uvicorn."""
    limits = {"max_connections": max_connections, "header_timeout_s": header_timeout_s}
    return type("GuardedProtocol", (GuardedProtocol,), limits)


def _refusal(status: int, phrase: str, code: str, message: str) -> bytes:
    body = json.dumps({"error": {"code": code, "message": message, "field": None}}).encode()
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body
