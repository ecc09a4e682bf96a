"""Atomic writes of files and folders, and errors in one line; knows nothing of what is written.

A write goes to a temporary path in the folder of its target and is renamed when it is complete and flushed to disk.
Whoever opens the target sees the old content or the new, never half of one. A failed write leaves nothing behind; a
killed process can leave its temporary path, see `leftovers`.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codmd_serve.errors import CodmdError, ConfigError

TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def atomic_file(path: Path, token: str = "") -> Iterator[Path]:
    """Yield a temporary path to write a file to; rename it to `path` when the block succeeds.

    Args:
        path: the target; one that exists is replaced. Its folder must exist.
        token: part of the temporary name, for who wants to find it again after a kill; random when empty.

    Raises:
        OSError: the file was not written, or cannot be flushed or renamed; `path` is untouched then.
    """
    temporary = _temporary(path, token)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # the error of the write itself is the one to report
            temporary.unlink(missing_ok=True)
    _flush_names(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; rename it to `path` when the block succeeds.

    Args:
        path: the target; a folder that exists is replaced, with all it holds. Missing parents are made.

    Raises:
        OSError: `path` is no folder, or the new one cannot be made, flushed or renamed; `path` is untouched then.
    """
    # Resolved: a link to a folder keeps pointing to it.
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} exists and is no folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = _temporary(path), _temporary(path)
    try:
        fresh.mkdir()
        yield fresh
        for folder, _, names in os.walk(fresh):
            for name in names:
                _flush(Path(folder) / name)
            _flush_names(Path(folder))
        _swap(fresh, path, old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    _flush_names(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically.

    Raises:
        OSError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON with a final newline, atomically; text that is not ASCII stays readable.

    Raises:
        OSError: the file cannot be written.
        TypeError, ValueError: JSON has no form for the value; nothing is written.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def check_name(path: Path) -> None:
    """Refuse a name that its file system cannot store, before anything is spent on making the content.

    Raises:
        ConfigError: the name or the whole path has too many bytes, or one that no name may have.
    """
    try:
        size, most = len(os.fsencode(path.name)), _most_name_bytes(path.parent)
    except UnicodeEncodeError:
        raise ConfigError(f"no file can be called {path.name[:40]!r}: it holds half of a character") from None
    if size > most:
        shown = f"{path.name[:40]}..."
        raise ConfigError(
            f"the name {shown} has {size} bytes, and names have at most {most} there: choose a shorter one"
        )
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise ConfigError(f"{str(path)[:80]!r} cannot be written: {getattr(error, 'strerror', error)}") from None


def _most_name_bytes(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # no such folder yet, or a system that does not tell
        return 255


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary paths in `folder`: of writes in progress, and of processes killed during one."""
    return sorted(folder.glob(f"{TEMPORARY_PREFIX}*"))


def first_line(error: BaseException) -> str:
    """Describe an error in one line: its type and the first line of its message; our own sentences without the type.

    torch, CUDA and compilers raise messages of many lines, of which the first says what happened.
    """
    name, message = type(error).__name__, str(error).strip()
    # Not splitlines: a message may quote text that holds other line ends.
    line = message.split("\n", 1)[0].rstrip("\r")
    if isinstance(error, CodmdError) and line:
        return line
    return f"{name}: {line or 'no message'}"


def _temporary(path: Path, token: str = "") -> Path:
    # Independent of the target's name, which can have the 255 bytes that a file system allows. With a suffix, because
    # torch.save refuses a name that is all suffix, as .tmp-1 is.
    return path.with_name(f"{TEMPORARY_PREFIX}{token or secrets.token_hex(6)}.partial")


def _swap(fresh: Path, path: Path, old: Path) -> None:
    if not path.exists():
        fresh.rename(path)
        return
    path.rename(old)
    try:
        fresh.rename(path)
    except OSError:
        old.rename(path)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_names(folder: Path) -> None:
    # Some file systems cannot flush a folder; the content is on disk then, only the rename may be lost.
    with contextlib.suppress(OSError):
        _flush(folder)
