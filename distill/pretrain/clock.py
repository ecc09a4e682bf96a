"""The time budget of all stages of a run, over all its sittings; knows no stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codmd_serve.errors import CheckpointError
from codmd_serve.files import write_json
from codmd_serve.textfiles import read_json_object

CLOCK_FILE = "elapsed.json"
# Of a time budget, what a stage may take at most; the last one gets what the others leave.
BUDGET_SHARES = {"text": 0.03, "vae": 0.27, "latents": 0.2}
LAST_STAGE = "transformer"
# What no stage counts as its own: interpreter, weights, files.
OTHER = "other"
RESERVED_SHARE = 0.02
LEAST_S = 1e-3


class Clock:
    """Seconds spent per stage, kept in RUN/elapsed.json, and what is left for a stage.

    Args:
        folder: RUN.
        minutes: budget of all stages; None is no limit.
        start: time.monotonic() when this sitting began; loading libraries counts.

    Attributes:
        total_s: budget of all stages; None is no limit.
        spent: per stage, this sitting included once the stage has ended.
    """

    def __init__(self, folder: Path, minutes: float | None, *, start: float) -> None:
        self.path, self.total_s = folder / CLOCK_FILE, None if minutes is None else 60 * minutes
        self.spent: dict[str, float] = {}
        if self.path.is_file():
            self.spent = {name: float(value) for name, value in read_json_object(self.path, CheckpointError).items()}
        self.mark = start

    def budget_s(self, stage: str) -> float | None:
        """Seconds that `stage` may take over all sittings; what has passed since the last one counts as other."""
        if self.total_s is None:
            return None
        self._count(OTHER)
        others = sum(value for name, value in self.spent.items() if name != stage)
        left = self.total_s * (1 - RESERVED_SHARE) - others
        share = BUDGET_SHARES.get(stage)
        return max(left if share is None else min(share * self.total_s, left), LEAST_S)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside as that of a stage."""
        self._count(OTHER)
        try:
            yield
        finally:
            self._count(name)

    def _count(self, name: str) -> None:
        now = time.monotonic()
        self.spent[name] = self.spent.get(name, 0.0) + now - self.mark
        self.mark = now
        write_json(self.path, self.spent)
