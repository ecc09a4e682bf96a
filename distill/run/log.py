"""What a run says while it trains: log.jsonl, TensorBoard and the progress bar; knows no network.

One line per window of iterations, with the means of their metrics.
"""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from codmd_serve.errors import CheckpointError
from codmd_serve.files import write_text
from distill.config import DistillConfig

LOG_FILE = "log.jsonl"

logger = logging.getLogger(__name__)


class RunLog:
    """Means of the metrics since the last line, to log.jsonl, TensorBoard and the progress bar.

    Args:
        out: folder of the run.
        config: lengths and batch.
        step: iterations already done; later lines of a log that is there are dropped.
        budget_s: of training; infinite without one.
        is_first: of several processes only the first one says anything.
    """

    def __init__(self, out: Path, config: DistillConfig, step: int, budget_s: float, is_first: bool = True) -> None:
        self.config, self.budget_s, self.is_first = config, budget_s, is_first
        self.path = out / LOG_FILE
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.window_start, self.window_step = time.monotonic(), step
        if not is_first:
            return
        _keep_lines_up_to(self.path, step)
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step)
        bar = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        # disable=None: no bar where nobody watches; the log lines stay.
        self.bar = tqdm(total=config.max_steps, initial=step, disable=None, bar_format=bar, dynamic_ncols=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_first:
            return
        self.bar.close()
        self.board.close()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Take in one iteration's metrics, without waiting for the device."""
        if not self.is_first:
            return
        for name, value in metrics.items():
            total, count = self.sums.get(name, (torch.zeros_like(value), 0))
            self.sums[name] = (total + value, count + 1)
        self.bar.update(1)

    def write(self, step: int, num_student_updates: int, num_skipped: int, elapsed_s: float) -> None:
        """Write one line of means and start the next window; the counts are since the start of the run.

        Raises:
            CheckpointError: the log cannot be written, as on a full disk.
        """
        if not self.is_first:
            return
        num_iterations, now = step - self.window_step, time.monotonic()
        seconds = max(now - self.window_start, 1e-9)
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        samples_per_s = num_iterations * self.config.batch_size / seconds
        remaining_s = min((self.config.max_steps - step) * seconds / num_iterations, self.budget_s - elapsed_s)
        record: dict[str, Any] = {
            "step": step,
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
        for name, value in means.items():
            self.board.add_scalar(name, value, step)
        self.board.add_scalar("samples_per_s", samples_per_s, step)
        # A dash where nothing was due: in a window without a student update, nan would look like a run gone wrong.
        shown = ("student_loss", "student_grad_norm", "critic_loss")
        text = " ".join(f"{name}={means[name]:.4g}" if name in means else f"{name}=-" for name in shown)
        line = f"{text} samples/s={samples_per_s:.3g} eta={tqdm.format_interval(record['eta_s'])}"
        self.bar.set_postfix_str(line)
        logger.info("step=%d %s", step, line)
        self.sums, self.window_start, self.window_step = {}, now, step

    def show(self, picture: np.ndarray | None, step: int) -> None:
        """Put a preview, uint8 (rows, columns, 3), on TensorBoard."""
        if picture is not None:
            self.board.add_image("preview", picture, step, dataformats="HWC")


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop lines that a resumed run will write again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_text(path, "".join(f"{line}\n" for line in kept))
