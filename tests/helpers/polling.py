"""Waiting in tests: a condition is polled until it holds or a deadline passes. No other test sleeps."""

import asyncio
import time
from collections.abc import Callable

INTERVAL_S = 0.01


def wait_until(condition: Callable[[], object], deadline_s: float, what: str) -> None:
    """Return as soon as `condition()` is true.

    Raises:
        AssertionError: it was not, `deadline_s` seconds long; says `what` was waited for.
    """
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s:g} s in vain until {what}"
        time.sleep(INTERVAL_S)


async def wait_until_async(condition: Callable[[], object], deadline_s: float, what: str) -> None:
    """Return as soon as `condition()` is true; other tasks of the event loop run meanwhile.

    Raises:
        AssertionError: it was not, `deadline_s` seconds long; says `what` was waited for.
    """
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s:g} s in vain until {what}"
        await asyncio.sleep(INTERVAL_S)


async def pause(seconds: float) -> None:
    """Let a client of a load do nothing for a while; no test waits for anything by it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0.0:
        await asyncio.sleep(left)
