"""Who may ask for what: API keys, rates, Host and Origin. Knows no route but those that are open.

A key is sent as `Authorization: Bearer KEY`, as `X-API-Key`, or as the password of HTTP Basic, which browsers ask for.
The file of keys holds one `NAME SHA256` a line: the hexadecimal SHA-256 of the key. Keys are long and random (the tests
refuse none, an operator should: `python -c "import secrets; print(secrets.token_urlsafe(32))"`), so a fast hash is
enough.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from codmd_serve.api.errors import error_response
from codmd_serve.config import LOOPBACK_HOSTS, ServeConfig
from codmd_serve.errors import ConfigError, QueueFullError
from codmd_serve.textfiles import read_text, split_lines

KEY_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?P<digest>[0-9a-f]{64})")
# Probes of an orchestrator have no key, and these tell nothing of anybody's job.
OPEN_PATHS = frozenset({"/health", "/ready"})
UNSAFE_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})
BUCKETS_KEPT = 10_000


def read_keys(path: str) -> dict[str, str]:
    """SHA-256 of every key by its name.

    Raises:
        ConfigError: no such file, a line that is none, a name twice, or no key at all.
    """
    if not path:
        return {}
    try:
        lines = split_lines(read_text(Path(path).expanduser(), ConfigError))
    except ConfigError as error:
        raise ConfigError(f"the file of API keys {error}") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = KEY_LINE.fullmatch(content)
        if match is None or match["name"] in keys:
            raise ConfigError(
                f"line {number} of {path} must be a new name and the SHA-256 of its key in 64 hexadecimal digits, as "
                "in: alice $(printf %s KEY | sha256sum)"
            )
        keys[match["name"]] = match["digest"]
    if not keys:
        raise ConfigError(f"the file of API keys {path} holds no key")
    return keys


def owner_of(request: Request) -> str:
    """Name of the API key of a request; empty where there are no keys."""
    owner: str = request.scope.get("codmd_owner", "")
    return owner


def check_rate(request: Request) -> None:
    """Count a job against the rate of its API key.

    Raises:
        QueueFullError: code rate_limited.
    """
    owner = owner_of(request)
    rates: Rates = request.app.state.rates
    if owner and (wait_s := rates.take(owner)) > 0:
        raise QueueFullError("this API key sends too many jobs", max(1, round(wait_s + 0.5)), "rate_limited")


class Rates:
    """Token buckets by owner: a minute's worth at once, then evenly.

    Args:
        per_minute: jobs; 0 is without a bound.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, owner: str) -> float:
        """Take a token; 0, or the seconds until there is one."""
        if not self.per_minute:
            return 0.0
        now_s = time.monotonic()
        tokens, at_s = self._buckets.pop(owner, (float(self.per_minute), now_s))
        tokens = min(float(self.per_minute), tokens + (now_s - at_s) * self.per_minute / 60)
        is_free = tokens >= 1
        self._buckets[owner] = (tokens - 1 if is_free else tokens, now_s)
        while len(self._buckets) > BUCKETS_KEPT:
            self._buckets.popitem(last=False)
        return 0.0 if is_free else (1 - tokens) * 60 / self.per_minute


class KeyCheck:
    """ASGI middleware that finds the API key of a request, and refuses one without.

    Args:
        app: the application.
        keys: SHA-256 by name; empty lets everybody in.
    """

    def __init__(self, app: ASGIApp, keys: Mapping[str, str]) -> None:
        self.app = app
        self.keys = {name: bytes.fromhex(digest) for name, digest in keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not self.keys or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        owner = self._owner(Headers(scope=scope))
        if owner is None:
            answer = error_response(401, "send an API key, as in Authorization: Bearer KEY")
            # The second lets a browser ask: the key is the password.
            answer.headers.append("WWW-Authenticate", "Bearer")
            answer.headers.append("WWW-Authenticate", 'Basic realm="codmd-serve: any name, the API key as password"')
            await answer(scope, receive, send)
            return
        await self.app({**scope, "codmd_owner": owner}, receive, send)

    def _owner(self, headers: Headers) -> str | None:
        key = sent_key(headers)
        digest = hashlib.sha256((key or "").encode(errors="surrogatepass")).digest()
        found = None
        # Every key is compared, each in constant time, so that the time tells nothing.
        for name, known in self.keys.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found if key else None


def sent_key(headers: Headers) -> str | None:
    """The API key that a request carries."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
    return headers.get("x-api-key")


class HostCheck:
    """ASGI middleware against DNS rebinding and requests of other web sites.

    A web site can let its own name resolve to this machine, and a browser then sends that name as Host. Addresses
    cannot be rebound, so every address is allowed, and the names that the server is bound to or configured with.

    Args:
        app: the application.
        names: lower case; `*` allows all.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) > 1 or (hosts and not self.allows(host_name(hosts[0]))):
            message = "this server does not go by the name in the Host header; allow it with --allowed-hosts"
            await error_response(421, message)(scope, receive, send)
            return
        origin = headers.get("origin")
        if origin is not None and scope.get("method") in UNSAFE_METHODS and not self._is_own(origin):
            await error_response(403, "requests of other web sites are refused")(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def allows(self, name: str | None) -> bool:
        """Whether the server may be called by a name."""
        if "*" in self.names:
            return True
        return name is not None and (name in self.names or _is_address(name))

    def _is_own(self, origin: str) -> bool:
        try:
            name = urlsplit(origin).hostname
        except ValueError:
            return False
        return self.allows(name)


def host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None when there is none."""
    try:
        parts = urlsplit(f"//{host}")
        return None if parts.username is not None or parts.path else parts.hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def allowed_names(config: ServeConfig) -> frozenset[str]:
    """Names that the server may be called by: this machine's where it listens to others, and the configured ones."""
    names = {"localhost", config.host.lower()}
    if config.host not in LOOPBACK_HOSTS:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    names |= {name.strip().lower() for name in config.allowed_hosts.split(",") if name.strip()}
    return frozenset(names)
