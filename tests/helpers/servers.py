"""A real `codmd-serve` for tests that talk to it as a user does."""

import socket

import httpx

READY_S = 300.0  # for a machine that has little to spare; it takes a few seconds


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_up(url: str) -> bool:
    """Whether `url` answers 200."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
