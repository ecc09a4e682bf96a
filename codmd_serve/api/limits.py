"""What a client may take of time and room: sizes and deadlines of bodies, and answers that nobody reads."""

import asyncio

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SEND_STALL_S = 60.0


class Limits:
    """ASGI middleware: a body is bounded in size and time, whatever its headers promise; HEAD is answered as GET.

    Args:
        app: the application.
        max_body_bytes: of a request.
        body_timeout_s: for the whole of it.
        send_stall_s: for the client to take some of an answer.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float, send_stall_s: float = SEND_STALL_S
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s
        self.send_stall_s = send_stall_s

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
            # A client that reads nothing would hold the answer, its task and its connection for ever.
            async with asyncio.timeout(self.send_stall_s):
                await send(message)

        await self.app(scope, limited_receive, limited_send)
