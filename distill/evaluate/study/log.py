"""The log of a study: JSON lines that are only appended, each on disk before the rater is told so.

A line that a crash cut off is kept and skipped: nothing is ever rewritten. Knows nothing of what the records mean.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from codmd_serve.errors import ConfigError

LOG_FILE = "answers.jsonl"


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read all records.

    Returns:
        The records in the order they were written, and the number of damaged lines, which are skipped. No file is no
        records.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    records, num_damaged = [], 0
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: of JSON or of UTF-8
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            num_damaged += 1
    return records, num_damaged


class AnswerLog:
    """The log of a study that is being served, locked against a second server.

    Args:
        path: of the file; made when needed.

    Raises:
        ConfigError: it cannot be opened, or another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise ConfigError(f"{path} is being written by another process: is the study served already?") from None
        self.records, self.num_damaged = read_records(path)
        self._ends_mid_line = self._is_torn()

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and flush it to disk; from any thread.

        Raises:
            OSError: it is not on disk. What of it is there does not spoil the next record.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            data = b"\n" + line if self._ends_mid_line else line
            self._ends_mid_line = True  # until the whole line is there
            written = os.write(self._file, data)
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
            self._ends_mid_line = False

    def close(self) -> None:
        """Close the file and release its lock."""
        os.close(self._file)

    def _is_torn(self) -> bool:
        size = os.lseek(self._file, 0, os.SEEK_END)
        return size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
