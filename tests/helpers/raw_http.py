"""A small HTTP/1.1 client on asyncio streams, cheap enough to load a server from the same two cores."""

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. `took_s` is from the first byte sent to the last received; header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes
    took_s: float

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Connections:
    """Keep-alive connections to one server; one per request in flight."""

    port: int
    timeout_s: float = 60.0
    _idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request, with a body as JSON; a stale connection is replaced once.

        Raises:
            OSError, asyncio.IncompleteReadError, TimeoutError: no whole answer came.
        """
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(content)}"]
        lines += ["content-type: application/json"] if content else []
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        async with asyncio.timeout(self.timeout_s):
            while True:
                is_fresh = not self._idle
                pair = await asyncio.open_connection("127.0.0.1", self.port) if is_fresh else self._idle.pop()
                try:
                    return await self._exchange(pair, head + content)
                except (OSError, asyncio.IncompleteReadError):
                    pair[1].close()
                    if is_fresh:
                        raise
                except BaseException:
                    pair[1].close()
                    raise

    async def _exchange(self, pair: tuple[asyncio.StreamReader, asyncio.StreamWriter], message: bytes) -> Answer:
        reader, writer = pair
        start_s = time.perf_counter()
        writer.write(message)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in head[1:-2]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        took_s = time.perf_counter() - start_s
        if headers.get("connection", "").lower() == "close":
            writer.close()
        else:
            self._idle.append(pair)
        return Answer(int(head[0].split()[1]), headers, body, took_s)

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._idle.clear()
