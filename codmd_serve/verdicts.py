"""Caches autotuning results on disk: timing the candidates costs seconds, the result is one word.

The key holds everything that a verdict depends on: device, versions, shape and bundle. A change of any of them measures
again. So does a file that cannot be read.
"""

import hashlib
import json
import logging
from pathlib import Path

from codmd_serve.files import atomic_file

FILE = "verdicts.json"
MAX_KEYS = 64

logger = logging.getLogger(__name__)


class Verdicts:
    """A cache of words by name, in a file that processes may share; the last writer wins.

    Args:
        folder: keeps the file; made when something is written. None remembers nothing.
        parts: what the verdicts depend on.
    """

    def __init__(self, folder: Path | None, *parts: object) -> None:
        self._file = None if folder is None else folder / FILE
        self._key = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def get(self, name: str, known: tuple[str, ...]) -> str | None:
        """Return the cached verdict if it is one of `known`, else None."""
        verdict = self._read().get(self._key, {}).get(name)
        return verdict if verdict in known else None

    def put(self, name: str, verdict: str) -> None:
        """Store a verdict. A folder that cannot be written only costs time at the next load."""
        if self._file is None:
            return
        entries = self._read()
        entry = {**entries.pop(self._key, {}), name: verdict}
        while len(entries) >= MAX_KEYS:
            entries.pop(next(iter(entries)))  # the one that was written longest ago
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._file) as temporary:
                temporary.write_text(json.dumps({**entries, self._key: entry}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("verdicts=unwritable reason=%r", str(error))

    def _read(self) -> dict[str, dict[str, str]]:
        if self._file is None:
            return {}
        try:
            entries = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("verdicts=unreadable reason=%r", str(error))
            return {}
        if not isinstance(entries, dict):
            logger.warning("verdicts=unreadable reason='no object'")
            return {}
        return {key: entry for key, entry in entries.items() if isinstance(entry, dict)}
