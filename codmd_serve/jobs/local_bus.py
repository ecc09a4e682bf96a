"""Messages between the processes of one SQLite store: a Unix datagram socket per process, in a folder beside the file.

A message may be lost: to a process that does not read, and where there are no such sockets. Knows no job.
"""

import contextlib
import errno
import os
import secrets
import socket
import time
from pathlib import Path

SUFFIX = ".sock"
BUFFER_BYTES = 2**18  # the largest message; a preview of a large video has some kilobytes
SEND_TIMEOUT_S = 0.2
SKIP_S = 5.0  # a process that did not read is not waited for again so soon


class LocalBus:
    """One process's place among those that share a folder.

    Args:
        folder: made when absent; closed to other users.

    Raises:
        OSError: no socket can be made there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.name = secrets.token_hex(8) + SUFFIX
        self._skipped_until_s: dict[str, float] = {}
        # Addresses have 108 bytes at most, and a data folder may lie deep.
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._outbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._inbox.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * BUFFER_BYTES)
            self._outbox.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * BUFFER_BYTES)
            self._outbox.settimeout(SEND_TIMEOUT_S)
            self._inbox.bind(self._address(self.name))
        except OSError:
            self.close()
            raise

    def send(self, message: bytes) -> None:
        """Send a message to every other process that reads; remove the sockets of those that are dead."""
        for name in self._others():
            if time.monotonic() < self._skipped_until_s.get(name, 0.0):
                continue
            try:
                self._outbox.sendto(message, self._address(name))
            except (ConnectionRefusedError, FileNotFoundError):  # its process is gone
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)
                self._skipped_until_s.pop(name, None)
            except TimeoutError:
                self._skipped_until_s[name] = time.monotonic() + SKIP_S
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS, errno.EACCES, errno.EPROTOTYPE):
                    raise

    def receive(self, timeout_s: float) -> bytes | None:
        """Return the next message; None when none came in time."""
        self._inbox.settimeout(timeout_s)
        try:
            return self._inbox.recv(BUFFER_BYTES)
        except TimeoutError:
            return None

    def close(self) -> None:
        """Leave the folder, and remove it when nobody is left."""
        self._inbox.close()
        self._outbox.close()
        with contextlib.suppress(OSError):
            (self.folder / self.name).unlink(missing_ok=True)
            self.folder.rmdir()
        os.close(self._descriptor)

    def _others(self) -> list[str]:
        try:
            return [path.name for path in self.folder.glob(f"*{SUFFIX}") if path.name != self.name]
        except FileNotFoundError:
            return []

    def _address(self, name: str) -> str:
        path = str(self.folder / name)
        linked = f"/proc/self/fd/{self._descriptor}/{name}"
        return linked if len(os.fsencode(path)) > 100 and Path("/proc/self/fd").is_dir() else path
