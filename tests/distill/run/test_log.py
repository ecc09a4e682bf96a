"""Lines of the log: what was due has a number, what was not has a dash."""

import logging
from pathlib import Path

import pytest
import torch

from distill.config import DistillConfig
from distill.run.log import RunLog


def test_a_window_without_a_student_update_shows_a_dash_and_no_nan(
    tiny_config: DistillConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), RunLog(tmp_path, tiny_config, 0, 60.0) as log:
        log.add({"critic_loss": torch.tensor(0.5)})
        log.write(1, 0, 0, 1.0)
        log.add({"critic_loss": torch.tensor(0.25), "student_loss": torch.tensor(float("nan"))})
        log.write(2, 1, 0, 2.0)
    first, second = (record.getMessage() for record in caplog.records)
    assert "student_loss=- student_grad_norm=- critic_loss=0.5 " in first and "nan" not in first
    assert "student_loss=nan " in second, "a loss that was due and is not a number is told"
