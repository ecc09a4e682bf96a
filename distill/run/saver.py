"""Checkpoints in the background: the training loop waits for the copy to host memory, not for the disk.

Knows no network. At most one save is in flight, so the host memory of a rank is that of one copy of its shards.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from distill.parallel.processes import Processes
from distill.parallel.state import StagedShard, stage
from distill.run.checkpoint import Score, save_checkpoint


class Saver:
    """Saves the checkpoints of a run; every rank has one and calls it at the same iterations.

    Args:
        run_dir: the run's folder.
        keep_last: how many of the newest checkpoints stay.
        processes: of the run.
    """

    def __init__(self, run_dir: Path, keep_last: int, processes: Processes) -> None:
        self.run_dir, self.keep_last, self.processes = run_dir, keep_last, processes
        self.failure: Exception | None = None
        self.thread: threading.Thread | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a save of this rank has failed; `wait` raises the error."""
        return self.failure is not None

    def save(
        self, iteration: int, tensors: dict[str, Tensor], values: dict[str, Any], score: Score | None = None
    ) -> None:
        """Copy this rank's shards and start to write them, after the save before is done.

        Args:
            iteration: iterations done.
            tensors: of the state; they may change when the call returns.
            values: plain JSON values, equal on all ranks.
            score: see `save_checkpoint`.

        Raises:
            CheckpointError: the save before failed.
        """
        self.wait()
        arguments = (iteration, stage(tensors), values, score)
        # A daemon: after a second Ctrl-C the process ends at once, and the unfinished folder is not yet a checkpoint.
        self.thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError: it failed, on this rank or on another.
        """
        self._join()
        if self.failure is not None:
            raise self.failure

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(
        self, iteration: int, staged: dict[str, StagedShard], values: dict[str, Any], score: Score | None
    ) -> None:
        try:
            save_checkpoint(self.run_dir, iteration, staged, values, self.keep_last, self.processes, score)
        except Exception as error:  # raised again by `wait`, in the training loop
            self.failure = error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that fails keeps the checkpoint that it has begun.
        self._join()
