"""The log of a run: log.jsonl, trackers and the progress bar; knows no network.

One line per `log_every_iterations` iterations, with the means of their metrics.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from codmd_serve.errors import CheckpointError
from codmd_serve.files import write_text
from distill.config import DistillConfig
from distill.run.trackers import DEFAULT, Run, Trackers

LOG_FILE, VALIDATION_FILE = "log.jsonl", "validation.jsonl"
ITERATION_KEY = "iteration"

logger = logging.getLogger(__name__)


class RunLog:
    """Writes the means of the metrics since the last line.

    Args:
        out: folder of the run.
        config: of the run.
        iteration: iterations already done; a resumed run drops later lines of its log.
        budget_s: of training; infinite without one.
        is_rank0: the other ranks write nothing.
        trackers: names of `trackers.TRACKERS`.

    Attributes:
        latest: the last logged mean of every metric, on rank 0.
    """

    def __init__(
        self,
        out: Path,
        config: DistillConfig,
        iteration: int,
        budget_s: float,
        is_rank0: bool = True,
        trackers: Sequence[str] = DEFAULT,
    ) -> None:
        self.config, self.budget_s, self.is_rank0 = config, budget_s, is_rank0
        self.path = out / LOG_FILE
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.latest: dict[str, float] = {}
        self.window_start, self.window_iteration = time.monotonic(), iteration
        if not is_rank0:
            return
        keep_lines_up_to(self.path, iteration)
        self.trackers = Trackers(trackers, Run(out=out, config=config, iteration=iteration))
        bar = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        # disable=None: no bar without a terminal; the log lines stay.
        self.bar = tqdm(
            total=config.max_iterations, initial=iteration, disable=None, bar_format=bar, dynamic_ncols=True
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_rank0:
            return
        self.bar.close()
        self.trackers.close()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one iteration, without synchronising with the device."""
        if not self.is_rank0:
            return
        for name, value in metrics.items():
            total, count = self.sums.get(name, (torch.zeros_like(value), 0))
            self.sums[name] = (total + value, count + 1)
        self.bar.update(1)

    def write(self, iteration: int, num_student_updates: int, num_skipped: int, elapsed_s: float) -> None:
        """Write one line of means and start the next window; counts are since the start of the run.

        Raises:
            CheckpointError: the log cannot be written, as on a full disk.
        """
        if not self.is_rank0:
            return
        num_iterations, now = iteration - self.window_iteration, time.monotonic()
        seconds = max(now - self.window_start, 1e-9)
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        # A metric without a turn in this window keeps its last mean.
        self.latest |= means
        samples_per_s = num_iterations * self.config.batch_size / seconds
        remaining_s = min(
            (self.config.max_iterations - iteration) * seconds / num_iterations, self.budget_s - elapsed_s
        )
        record: dict[str, Any] = {
            ITERATION_KEY: iteration,
            "student_updates": num_student_updates,
            "num_skipped": num_skipped,
            "elapsed_s": round(elapsed_s, 3),
            "samples_per_s": round(samples_per_s, 3),
            "eta_s": round(max(remaining_s, 0.0), 1),
            **{name: value if math.isfinite(value) else None for name, value in means.items()},
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written: {error.strerror}; the last checkpoint is kept"
            ) from error
        self.trackers.log({**means, "samples_per_s": samples_per_s}, iteration)
        # A dash where nothing was due: in a window without a student update, nan would look like a run gone wrong.
        shown = ("student_loss", "student_grad_norm", "critic_loss")
        text = " ".join(f"{name}={means[name]:.4g}" if name in means else f"{name}=-" for name in shown)
        line = f"{text} samples/s={samples_per_s:.3g} eta={tqdm.format_interval(record['eta_s'])}"
        self.bar.set_postfix_str(line)
        logger.info("iteration=%d %s", iteration, line)
        self.sums, self.window_start, self.window_iteration = {}, now, iteration

    def show(self, picture: np.ndarray | None, iteration: int) -> None:
        """Show a preview, uint8 (rows, columns, 3), on the trackers."""
        if picture is not None:
            self.trackers.show("preview", picture, iteration)

    def validated(self, values: Mapping[str, float], iteration: int, seconds: float) -> None:
        """Show the scores of a validation, and leave its seconds out of the rate of training."""
        self.window_start += seconds
        if self.is_rank0 and values:
            self.trackers.log(values, iteration)


def iteration_of(record: dict[str, Any]) -> int:
    """Return the iteration of a line of log.jsonl; older versions called it `step`."""
    return int(record[ITERATION_KEY] if ITERATION_KEY in record else record["step"])


def keep_lines_up_to(path: Path, iteration: int) -> None:
    """Drop the lines that a resumed run will write again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if line.endswith("}") and iteration_of(json.loads(line)) <= iteration]
    write_text(path, "".join(f"{line}\n" for line in kept))
