"""What the body of a request may take of time and room. Deadlines of headers and answers are in connections.py."""

import asyncio

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Limits:
    """ASGI middleware: a body is bounded in size and time, whatever its headers promise; HEAD is answered as GET.

    Args:
        app: the application.
        max_body_bytes: of a request.
        body_timeout_s: for the whole of it.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        if is_head:
            scope = {**scope, "method": "GET"}
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self.body_timeout_s
        num_bytes, is_whole, is_answered = 0, False, False

        async def limited_receive() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # from here on it only says that the client left
                return await receive()
            try:
                async with asyncio.timeout_at(max(deadline_s, loop.time() + 0.001)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive in {self.body_timeout_s:g} s") from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                raise HTTPException(413, f"the body is larger than {self.max_body_bytes} bytes")
            is_whole = not message.get("more_body", False)
            return message

        async def limited_send(message: Message) -> None:
            nonlocal is_answered
            if is_head and message["type"] == "http.response.body":
                if is_answered:
                    return
                message, is_answered = {"type": "http.response.body", "body": b"", "more_body": False}, True
            await send(message)

        await self.app(scope, limited_receive, limited_send)
