"""Requests that no client should send, as raw bytes: bodies, heads and paths, drawn from a seeded generator."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

PATHS = ("/generate", "/v1/videos", "/v1/videos/sync")
FIELDS = ("prompt", "seed", "height", "width", "num_frames", "fps", "crf", "quality", "format", "preview")
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**63, -(2**70), 1e400, 0.5, "", " ", "\u0000", "\ud800", "a" * 5000, [], {}, [[]],
    {"a": {"b": []}}, "../../etc/passwd", "%00", "\u202e", "1e9", "nan", [1] * 100,
)  # fmt: skip
ROUTES = (
    "/", "/generate", "/jobs", "/jobs/", "/health", "/ready", "/metrics", "/docs", "/openapi.json", "/v1/videos",
    "/v1/models", "/v1/videos/sync", "/config", "/queue/join", "/queue/data", "/gradio_api/queue/join",
    "/gradio_api/upload", "/gradio_api/file=", "/gradio_api/dev/reload", "/gradio_api/call/x", "/assets/x.js",
    "/static/", "/theme.css", "/login",
)  # fmt: skip
PIECES = (
    "..", "%2e%2e", "..%2f", "%00", "\\", "//", "%ff", "%c0%af", "a" * 300, ";", "?", "#", "%", "{}", "~", "etc/passwd",
    "proc/self/environ", "video", "events", "content", "0" * 24, "<script>", "$(id)", "%F0%9F%98%80", "con",
    ".git/config",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW")
HEADER_NAMES = (
    "prefer", "idempotency-key", "cache-control", "range", "if-none-match", "last-event-id", "content-type", "accept",
    "content-encoding", "transfer-encoding", "content-length", "connection", "upgrade", "expect", "origin", "cookie",
    "authorization", "x-api-key", "x-forwarded-for", "te", "host",
)  # fmt: skip
HEADER_VALUES = (
    b"", b" ", b"\x00", b"\xff\xfe", b"a" * 9000, b"bytes=0-", b"bytes=9-1", b"bytes=-99999999999999999999",
    b"wait=1e9",
    b"wait=-1", b"respond-async, wait=0", b"chunked", b"gzip", b"gzip, chunked", b"-1", b"1e3", b"0x10",
    b"999999999999",
    b"websocket", b"100-continue", b"close", b"null", b"Basic !!!", b"Bearer ", b"\"unfinished", b"a\tb",
    b"text/html; q=x",
    b"multipart/form-data", b"multipart/form-data; boundary=", b"application/json; charset=nonsense",
)  # fmt: skip


def request(
    method: str, path: str, body: bytes = b"", kind: str = "application/json", length: int | None = None
) -> bytes:
    """A request that is right but for what it is given."""
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    if body or length is not None:
        head += f"content-type: {kind}\r\ncontent-length: {len(body) if length is None else length}\r\n"
    return head.encode("latin-1", "replace") + b"\r\n" + body


def bad_bodies(rng: random.Random, number: int) -> Iterator[bytes]:
    """Bodies: other types, values out of range, broken JSON, forms that are none, and lengths that lie."""
    makers: tuple[Callable[[random.Random], tuple[bytes, str]], ...] = (_strange_json, _broken_json, _noise, _form)
    for index in range(number):
        body, kind = makers[index % len(makers)](rng)
        yield request("POST", rng.choice(PATHS), body, kind)


def _strange_json(rng: random.Random) -> tuple[bytes, str]:
    body: dict[str, Any] = {"prompt": "a"}
    for field in rng.sample(FIELDS, rng.randrange(1, 4)):
        body[field] = rng.choice(STRANGE)
    body[rng.choice(("unknown", "prompt\u0000", "", "__class__"))] = rng.choice(STRANGE)  # so it is never taken
    return json.dumps(body).encode("utf-8", "surrogatepass"), "application/json"


def _broken_json(rng: random.Random) -> tuple[bytes, str]:
    whole = json.dumps({"prompt": "a red circle", "seed": rng.randrange(99)}).encode()
    cut = whole[: rng.randrange(len(whole))]
    tail = rng.choice((b"", b"}}", b"\x00", b'"', b"[" * 5000, b'{"a":' * 2000, b"\xff", b"NaN", b"'"))
    return cut + tail, rng.choice(("application/json", "text/plain", "application/xml", "", "*/*"))


def _noise(rng: random.Random) -> tuple[bytes, str]:
    return rng.randbytes(rng.choice((1, 10, 1000, 70_000))), rng.choice(
        ("application/json", "application/octet-stream")
    )


def _form(rng: random.Random) -> tuple[bytes, str]:
    boundary = rng.choice(("x", "", "a" * 300, "\u00e9"))
    name = rng.choice(("prompt", "", "file", "../x", "a" * 2000))
    file = rng.choice(("", '; filename="../../x"', '; filename=""', "; filename*=utf-8''%ff"))
    end = rng.choice(("--", "", "-", "\r\n--x--"))
    text = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n\x00{"v" * rng.randrange(50)}\r\n'
    )
    body = (text * rng.choice((1, 3, 100)) + f"--{boundary}{end}").encode("utf-8")
    return body, f"multipart/form-data; boundary={boundary}"


def bad_heads(rng: random.Random, number: int) -> Iterator[bytes]:
    """Heads: strange methods, versions, lines and values, repeated and contradictory headers."""
    for index in range(number):
        method, path = rng.choice(METHODS), rng.choice(ROUTES[1:11])
        lines = [f"{method} {path} {rng.choice(('HTTP/1.1', 'HTTP/1.1', 'HTTP/1.1', 'HTTP/9.9', 'HTTP', ''))}".encode()]
        if rng.random() < 0.8:
            lines.append(
                b"host: "
                + rng.choice((b"127.0.0.1", b"127.0.0.1", b"127.0.0.1", b"evil.example", b"", b"\xff", b"[::"))
            )
        for _ in range(rng.randrange(1, 4)):
            lines.append(rng.choice(HEADER_NAMES).encode() + b": " + rng.choice(HEADER_VALUES))
        if index % 7 == 0:
            lines.insert(
                rng.randrange(len(lines)), rng.choice((b"no colon", b": no name", b" folded", b"a b: c", b"x" * 70_000))
            )
        lines.append(b"connection: close")
        end = rng.choice((b"\r\n\r\n", b"\r\n\r\n", b"\r\n\r\n", b"\n\n", b"\r\n\r\n\r\n\x00"))
        yield b"\r\n".join(lines) + end


def bad_paths(rng: random.Random, number: int) -> Iterator[bytes]:
    """Paths: traversal, bytes that are no text, endless ones, ids that are none, all methods."""
    for _ in range(number):
        path = rng.choice(ROUTES) + "/".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 5)))
        if rng.random() < 0.3:
            path += "?" + "&".join(f"{rng.choice(PIECES)}={rng.choice(PIECES)}" for _ in range(3))
        body = rng.choice((b"", b"{}", b'{"prompt": 1}'))
        yield request(rng.choice(METHODS[:-3]), path.replace(" ", "%20"), body)
