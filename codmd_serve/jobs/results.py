"""Where finished videos lie: a folder, or an fsspec URL such as s3://bucket/videos. Knows no job.

A result is there whole or not at all, and is flushed to disk before `put` returns.
"""

import contextlib
import errno
import hashlib
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codmd_serve.errors import ConfigError, StorageFullError, StoreError
from codmd_serve.files import TEMPORARY_PREFIX, atomic_file
from codmd_serve.jobs.states import Result

CHUNK_BYTES = 2**20
LEFTOVER_AGE_S = 3600.0  # a file of no job may be one that another dispatcher is about to write down
MEDIA_TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".webp": "image/webp"}
# Their writes appear whole; elsewhere a file is moved to its name when it is complete.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
FULL = (errno.ENOSPC, errno.EDQUOT)


class ResultStore:
    """Videos by name. Every method blocks: call it in a thread.

    Args:
        address: a folder, made when absent, or a URL of fsspec.

    Raises:
        ConfigError: a URL whose protocol is unknown or not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.folder: Path | None = None
        self._files: Any = None
        self._root = ""
        if "://" not in address:
            self.folder = Path(address).expanduser().absolute()
            return
        import fsspec

        try:
            self._files, self._root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"results place {address!r} cannot be used: {error}") from None

    def check(self) -> None:
        """Write and delete a probe.

        Raises:
            StorageFullError, StoreError: it cannot be written.
        """
        name = f"{TEMPORARY_PREFIX}probe-{secrets.token_hex(6)}"
        with self._explained():
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                probe = self.folder / name
                try:
                    probe.write_bytes(bytes(4096))
                finally:
                    probe.unlink(missing_ok=True)
            else:
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(self._path(name), b"codmd")
                self._files.rm_file(self._path(name))

    def put(self, source: Path, ttl_s: float, result_id: str = "") -> Result:
        """Keep a finished file; the source stays where it is.

        Args:
            source: the suffix says what it is.
            ttl_s: seconds from now until it may be deleted.
            result_id: random when empty; `discard` finds by it what a killed process left.

        Raises:
            StorageFullError, StoreError: it was not kept.
        """
        result_id = result_id or secrets.token_hex(12)
        name = _name(result_id, source.suffix)
        with self._explained():
            with source.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if self.folder is not None:
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path, result_id) as temporary:
                    shutil.copyfile(source, temporary)
            else:
                self._upload(source, name)
            num_bytes = source.stat().st_size
        return Result(
            id=result_id,
            name=name,
            num_bytes=num_bytes,
            sha256=sha256,
            media_type=MEDIA_TYPES.get(source.suffix, "application/octet-stream"),
            expires_at=time.time() + ttl_s,
        )

    def _upload(self, source: Path, name: str) -> None:
        protocols = self._files.protocol
        is_object_store = set(OBJECT_STORES) & set([protocols] if isinstance(protocols, str) else protocols)
        self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
        if is_object_store:
            self._files.put_file(str(source), self._path(name))
            return
        partial = self._path(_partial(name))
        try:
            self._files.put_file(str(source), partial)
            self._files.mv(partial, self._path(name))
        except BaseException:
            with contextlib.suppress(Exception):
                self._files.rm_file(partial)
            raise

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when it is not there."""
        with self._explained():
            try:
                if self.folder is not None:
                    return (self.folder / name).stat().st_size
                return int(self._files.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes start..end of a file, end excluded, in chunks.

        Raises:
            StoreError: the file cannot be read.
        """
        with self._explained():
            if self.folder is not None:
                with (self.folder / name).open("rb") as file:
                    file.seek(start)
                    while start < end and (chunk := file.read(min(CHUNK_BYTES, end - start))):
                        start += len(chunk)
                        yield chunk
            else:
                for begin in range(start, end, CHUNK_BYTES):
                    yield self._files.cat_file(self._path(name), start=begin, end=min(end, begin + CHUNK_BYTES))

    def delete(self, name: str) -> None:
        """Delete a file that may be gone already."""
        with self._explained(), contextlib.suppress(FileNotFoundError):
            if self.folder is not None:
                (self.folder / name).unlink()
            else:
                self._files.rm_file(self._path(name))

    def discard(self, result_id: str) -> None:
        """Delete a result that no job has, or the half of it that a killed process left."""
        for suffix in MEDIA_TYPES:
            name = _name(result_id, suffix)
            self.delete(name)
            if self.folder is None:
                self.delete(_partial(name))
        if self.folder is not None:
            self.delete(f"{result_id[:2]}/{TEMPORARY_PREFIX}{result_id}.partial")

    def leftovers(self, age_s: float = LEFTOVER_AGE_S) -> list[str]:
        """Names of files that are older than that; those of no result are left over from a killed process."""
        oldest = time.time() - age_s
        with self._explained():
            if self.folder is None:
                found = self._files.find(self._root, detail=True)
                begin = len(self._root.rstrip("/")) + 1
                return [name[begin:] for name, info in found.items() if _modified(info, oldest) < oldest]
            paths = [path for path in self.folder.rglob("*") if path.is_file()]
            return [str(path.relative_to(self.folder)) for path in paths if _mtime(path, oldest) < oldest]

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (StoreError, StorageFullError):
            raise
        except OSError as error:
            if error.errno in FULL:
                raise StorageFullError("there is no room for more videos") from error
            raise StoreError(f"the results place cannot be used: {error.strerror or type(error).__name__}") from error
        except Exception as error:  # every file system of fsspec has exceptions of its own
            raise StoreError(f"the results place cannot be used: {type(error).__name__}") from error


def _name(result_id: str, suffix: str) -> str:
    return f"{result_id[:2]}/{result_id}{suffix}"


def _partial(name: str) -> str:
    return f"{TEMPORARY_PREFIX}{name.rpartition('/')[2]}"


def _mtime(path: Path, default: float) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # deleted meanwhile
        return default


def _modified(info: dict[str, Any], default: float) -> float:
    value = info.get("LastModified") or info.get("mtime") or info.get("created") or default
    return float(value.timestamp() if hasattr(value, "timestamp") else value)
