"""Which dispatchers of this data folder are alive: each holds a lock that the kernel drops when its process ends.

A dispatcher that finds the lock of another one free knows that it was killed, sweeps its spool, and can give its jobs
back at once, instead of waiting for their leases to run out.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from pathlib import Path

from codmd_serve.errors import StorageFullError, StoreError
from codmd_serve.jobs.results import FULL


class Ownership:
    """Takes a name and a spool folder for one dispatcher.

    Args:
        data: folder of this machine; made when absent.

    Attributes:
        owner: unguessable name.
        spool: folder for unfinished videos. It may vanish while running: `folder` makes it again.

    Raises:
        StoreError, StorageFullError: the folder cannot be written.
    """

    def __init__(self, data: Path) -> None:
        self.owner = secrets.token_hex(12)
        self._locks = data / "dispatchers"
        self._spools = data / "spool"
        self.spool = self._spools / self.owner
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            # Held until the process ends, however it ends. Workers and encoders do not inherit it.
            self._lock = os.open(self._lock_path(self.owner), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.folder()
        except OSError as error:
            raise _explained(error, data) from error

    def folder(self) -> Path:
        """The spool, made again when something removed it."""
        self.spool.mkdir(parents=True, exist_ok=True)
        return self.spool

    def place(self, job_id: str, format: str) -> Path:
        """Where the video of an attempt goes: in a folder of its own, with whatever a killed worker leaves beside it.

        Raises:
            StoreError, StorageFullError: the folder cannot be made.
        """
        path = self.spool / f"{job_id}.{secrets.token_hex(4)}" / f"{job_id}.{format}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _explained(error, self.spool) from error
        return path

    def unfinished(self, owner: str) -> list[str]:
        """Jobs that a dead owner was at."""
        folder = self._spools / owner
        return [path.name.partition(".")[0] for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []

    def dead(self) -> list[str]:
        """Owners whose process is gone."""
        names = {path.stem for path in self._locks.glob("*.lock")}
        if self._spools.is_dir():
            names |= {path.name for path in self._spools.iterdir() if path.is_dir()}
        return sorted(name for name in names - {self.owner} if self._is_dead(name))

    def sweep(self, owner: str) -> None:
        """Remove what a dead owner left. Give its jobs back first: its lock is what tells that it was killed."""
        shutil.rmtree(self._spools / owner, ignore_errors=True)
        self._lock_path(owner).unlink(missing_ok=True)

    def release(self) -> None:
        """Give up the name."""
        shutil.rmtree(self.spool, ignore_errors=True)
        self._lock_path(self.owner).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def _is_dead(self, owner: str) -> bool:
        try:
            descriptor = os.open(self._lock_path(owner), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _lock_path(self, owner: str) -> Path:
        return self._locks / f"{owner}.lock"


def _explained(error: OSError, folder: Path) -> StoreError | StorageFullError:
    if error.errno in FULL:
        return StorageFullError(f"no room in the data folder {folder}")
    return StoreError(f"the data folder {folder} cannot be written to: {error.strerror}")
