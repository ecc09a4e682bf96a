"""Calls the address that a client named when its job is finished: signed, over https, to public addresses only.

The name is resolved once and the connection goes to the address that was judged, so that a name cannot point elsewhere
a moment later; every redirect is judged anew.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from codmd_serve.config import ServeConfig
from codmd_serve.errors import ConfigError, InvalidRequestError
from codmd_serve.jobs.states import Job

# Imported when the first webhook is due: it would be a tenth of the start of every server.
if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 10.0
MAX_REDIRECTS = 3
MIN_SECRET_BYTES = 16

logger = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[list[str]]]


def check_webhook_url(url: str, config: ServeConfig) -> None:
    """Refuse a webhook that would not be called.

    Raises:
        InvalidRequestError: webhooks are off, the host is not allowed, or the URL is not plain https.
    """
    if not config.webhook_hosts:
        raise InvalidRequestError("this server calls no webhooks: leave webhook_url out", "webhook_url")
    problem = judge_url(url, config.webhook_hosts)
    if problem:
        raise InvalidRequestError(f"webhook_url {problem}", "webhook_url")


def judge_url(url: str, allowed: str) -> str:
    """What is wrong with a URL; empty for nothing.

    Args:
        url: anything.
        allowed: hosts separated by commas; `*` is every host, `*.example.org` those below it.
    """
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        return "must be an https:// address"
    if parts.scheme != "https" or not name or not url.isascii() or not url.isprintable() or " " in url:
        return "must be an https:// address"
    if parts.username is not None or parts.password is not None or port not in (None, 443):
        return "must have no user name and no port but 443"
    hosts = [host.strip().lower() for host in allowed.split(",")]
    is_allowed = any(
        host in ("*", name) or (host.startswith("*.") and name.endswith(host[1:])) for host in hosts if host
    )
    return "" if is_allowed else "must be on a host that the operator allows"


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also inside an IPv6 form of an IPv4 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    inner = None
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if parsed in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
    return parsed.is_global and not parsed.is_multicast and (inner is None or inner.is_global)


def read_secret(config: ServeConfig) -> bytes:
    """The secret that webhooks are signed with; empty where they are off.

    Raises:
        ConfigError: it cannot be read, or is too short.
    """
    if not config.webhook_hosts:
        return b""
    try:
        secret = Path(config.webhook_secret_file).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the webhook secret {config.webhook_secret_file} cannot be read: {error.strerror}") from None
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"the webhook secret must have at least {MIN_SECRET_BYTES} bytes, got {len(secret)}")
    return secret


def sign(secret: bytes, timestamp: int, body: bytes) -> str:
    """HMAC-SHA256 of `TIMESTAMP.BODY`, as in the header X-Codmd-Signature."""
    return "sha256=" + hmac.new(secret, str(timestamp).encode() + b"." + body, hashlib.sha256).hexdigest()


class Webhooks:
    """Delivers them.

    Args:
        config: allowed hosts.
        secret: for signatures.
        resolve: addresses of a name.
        transport: of httpx; tests have one of their own.
    """

    def __init__(
        self,
        config: ServeConfig,
        secret: bytes,
        resolve: Resolve | None = None,
        transport: "httpx.AsyncBaseTransport | None" = None,
    ) -> None:
        self.config = config
        self.secret = secret
        self.resolve = resolve or _resolve
        self.transport = transport

    async def deliver(self, job: Job) -> bool:
        """Call the webhook of a final job once; True when it was taken with 2xx, or will never be."""
        import httpx

        error = {"code": job.error_code, "message": job.error_message} if job.status == "failed" else None
        content = {"id": job.id, "status": job.status, "seed": job.params.seed, "error": error}
        body = json.dumps(content | ({"video": f"/jobs/{job.id}/video"} if job.status == "completed" else {})).encode()
        url = job.webhook_url
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, transport=self.transport) as client:
            for _ in range(MAX_REDIRECTS + 1):
                problem = judge_url(url, self.config.webhook_hosts)
                if problem:
                    logger.warning("job=%s webhook %s, given up", job.id, problem)
                    return True
                try:
                    async with asyncio.timeout(TIMEOUT_S):
                        answer = await self._post(client, url, job.id, body)
                except (httpx.HTTPError, OSError, TimeoutError) as error_:
                    logger.warning("job=%s webhook failed: %s", job.id, type(error_).__name__)
                    return False
                if answer is None:
                    logger.warning("job=%s webhook has no public address, given up", job.id)
                    return True
                if answer.status_code not in (301, 302, 303, 307, 308) or "location" not in answer.headers:
                    return answer.is_success
                with contextlib.suppress(ValueError):
                    url = urljoin(url, answer.headers["location"])
        return False

    async def _post(self, client: "httpx.AsyncClient", url: str, job_id: str, body: bytes) -> "httpx.Response | None":
        """One request, to an address that was judged; None when the name has none that is public."""
        import httpx

        name = urlsplit(url).hostname
        assert name is not None
        addresses = await self.resolve(name, 443)
        if not addresses or not all(is_public(address) for address in addresses):
            return None
        timestamp = int(time.time())
        headers = {
            "Host": name,
            "Content-Type": "application/json",
            "X-Codmd-Job": job_id,
            "X-Codmd-Timestamp": str(timestamp),
            "X-Codmd-Signature": sign(self.secret, timestamp, body),
        }
        target = httpx.URL(url).copy_with(host=addresses[0])
        request = client.build_request("POST", target, content=body, headers=headers)
        # TLS is checked against the name, though the connection goes to the address.
        request.extensions["sni_hostname"] = name
        answer = await client.send(request, stream=True, follow_redirects=False)
        await answer.aclose()  # its body is of no interest, and may be endless
        return answer


async def _resolve(name: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]
