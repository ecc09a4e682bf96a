"""A log becomes one panel per number; damage in it does not stop a run."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.cli import main
from distill.config import DistillConfig
from distill.run.curves import plot_curves, read_curves, write_curves
from distill.run.log import LOG_FILE, RunLog
from distill.run.trainer import RunOptions, run_training


def write_log(path: Path, num_metrics: int) -> None:
    records = [
        {"iteration": count, "eta_s": 1.0, **{f"metric_{index}": count * index for index in range(num_metrics)}}
        for count in range(20, 120, 20)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_curves_skip_what_is_not_a_number_and_a_line_cut_short(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"iteration": 2, "loss": 0.5, "eta_s": 3}\n{"iteration": 4, "loss": null, "gap": 1}\n{"iterati')
    assert read_curves(log) == {"loss": ([2], [0.5]), "gap": ([4], [1])}
    assert read_curves(tmp_path / "none.jsonl") == {}


def test_log_of_an_older_version_is_read_and_continued(tmp_path: Path, tiny_config: DistillConfig) -> None:
    """Older versions called the iteration `step`."""
    log = tmp_path / LOG_FILE
    log.write_text('{"step": 2, "loss": 0.5}\n{"step": 4, "loss": 0.25}\n{"step": 6, "loss": 0.125}\n')
    with RunLog(tmp_path, tiny_config, 4, 60.0) as resumed:
        resumed.add({"loss": torch.tensor(0.75)})
        resumed.write(5, num_student_updates=2, num_skipped=0, elapsed_s=1.0)
    assert read_curves(log)["loss"] == ([2, 4, 5], [0.5, 0.25, 0.75])


def test_every_number_gets_a_panel(tmp_path: Path) -> None:
    heights = []
    for num_metrics in (3, 6):
        write_log(tmp_path / "log.jsonl", num_metrics)
        plot_curves(read_curves(tmp_path / "log.jsonl"), tmp_path / "curves.png")
        picture = Image.open(tmp_path / "curves.png").convert("RGB")
        heights.append(picture.height)
        assert picture.width == 1200
        assert np.asarray(picture).std() > 1
    assert heights == [240, 480]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]


def test_empty_log_draws_nothing(tmp_path: Path) -> None:
    write_curves(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_picture_that_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_log(tmp_path / "log.jsonl", 1)
    (tmp_path / "curves.png").mkdir()
    (tmp_path / "curves.png" / "file").touch()
    with caplog.at_level(logging.WARNING):
        write_curves(tmp_path)
    assert (tmp_path / "curves.csv").read_text().startswith("iteration,metric_0\n20,0\n40,0\n")
    assert "no curves" in caplog.text


def test_run_folder_holds_all_that_tells_of_the_run(tiny_config: DistillConfig, tmp_path: Path) -> None:
    run_training(tiny_config, RunOptions(out=tmp_path / "run", device=torch.device("cpu")), resume=False)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "bundle",
        "cache",
        "checkpoints",
        "config.json",
        "curves.csv",
        "curves.png",
        "log.jsonl",
        "pipeline",
        "previews",
        "tensorboard",
    ]


def test_runs_are_drawn_together_each_in_one_colour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run alone has metric_1; its line there has the colour that it has for metric_0."""
    for name, num_metrics in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        write_log(tmp_path / name / LOG_FILE, num_metrics)
    runs, out = [str(tmp_path / name) for name in ("first", "second")], tmp_path / "both.png"
    assert main(["curves", *runs, "--out", str(out), "--names", "metric_0", "metric_1"]) == 0
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    panels = np.array_split(picture, 3, axis=1)
    blue, orange = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)
    has = [[bool((np.abs(panel - colour).max(axis=2) < 12).any()) for colour in (blue, orange)] for panel in panels]
    # Both runs have the same metric_0, so the second line hides the first but for its legend.
    assert has == [[True, True], [False, True], [False, False]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--names", "nothing"], "no run has the number 'nothing', expected one of: metric_0"),
        (["RUN", "EMPTY"], "EMPTY holds no log of a run: expected log.jsonl"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RUN", "EMPTY"):
        (tmp_path / name).mkdir()
    write_log(tmp_path / "RUN" / LOG_FILE, 1)
    placed = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    assert main(["curves", *placed, "--out", str(tmp_path / "none.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()
