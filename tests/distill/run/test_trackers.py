"""Trackers show a run and cannot end it; one whose package is missing is refused with the command that installs it."""

import importlib.util
import logging
import sqlite3
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.run import trackers
from distill.run.log import RunLog
from distill.run.trackers import Run, Trackers, check_trackers


@pytest.fixture
def tracked(tiny_config: DistillConfig, tmp_path: Path) -> Run:
    return Run(out=tmp_path / "student", config=tiny_config, iteration=4)


class FakeWandb(types.ModuleType):
    """Notes what the real package is called with."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.Image = lambda picture: ("image", picture.shape)

    def init(self, **options: Any) -> "FakeWandb":
        self.calls.append(("init", options))
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, values: dict[str, Any]) -> None:
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_wandb_is_told_the_run_its_numbers_and_pictures(
    tracked: Run, tiny_config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    shown = Trackers(["wandb"], tracked)
    shown.log({"loss": 0.5}, 6)
    shown.show("preview", np.zeros((2, 3, 3), np.uint8), 6)
    shown.close()
    (_, options), *rest = wandb.calls
    assert (options["project"], options["name"], options["dir"]) == ("codmd", "student", str(tracked.out))
    # Another sitting of the same folder goes on with the same run.
    assert options["id"] == Run(out=tracked.out, config=tiny_config, iteration=0).identity
    assert options["id"] != Run(out=tracked.out / "x", config=tiny_config, iteration=0).identity
    assert options["config"]["method"] == "codmd"
    assert rest == [
        ("define_metric", ("*", "iteration")),
        ("log", {"loss": 0.5, "iteration": 6}),
        ("log", {"preview": ("image", (2, 3, 3)), "iteration": 6}),
        ("finish", None),
    ]


def test_trackio_keeps_the_numbers_on_this_machine(
    tiny_config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trackio")  # it is in the extra `dev`
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    with RunLog(tmp_path, tiny_config, 0, 60.0, trackers=["trackio"]) as log:
        log.add({"loss": torch.tensor(0.5)})
        log.write(2, 1, 0, 1.0)
        log.validated({"shapebench.all": 0.25}, 2, 0.0)
    assert capsys.readouterr().out == ""
    with sqlite3.connect(tmp_path / "codmd.db") as store:
        text = " ".join(str(row) for row in store.execute("SELECT step, metrics FROM metrics"))
    assert "loss" in text and "shapebench.all" in text and "0.25" in text


class Broken:
    """A tracker that fails at its n-th call."""

    def __init__(self, good_calls: int) -> None:
        self.good_calls = good_calls

    def _call(self, *_: object) -> None:
        self.good_calls -= 1
        if self.good_calls < 0:
            raise ConnectionError("no route to host\nmore lines")

    log = show = close = _call


@pytest.mark.parametrize("good_calls", [0, 1, 2, 3])
def test_a_tracker_that_fails_is_left_out_with_one_line_and_the_others_go_on(
    tracked: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, good_calls: int
) -> None:
    def make(_: Run) -> Broken:
        if good_calls == 0:
            raise ConnectionError("no route to host\nmore lines")
        return Broken(good_calls - 1)

    told: list[str] = []

    class Good:
        def log(self, values: Any, iteration: int) -> None:
            told.append(f"log {iteration}")

        def show(self, name: str, picture: Any, iteration: int) -> None:
            told.append(f"show {iteration}")

        def close(self) -> None:
            told.append("close")

    known = {"broken": (make, "sys"), "good": (lambda _: Good(), "sys")}
    monkeypatch.setattr(trackers, "TRACKERS", known)
    with caplog.at_level(logging.WARNING):
        shown = Trackers(["broken", "good"], tracked)
        shown.log({"loss": 1.0}, 2)
        shown.show("preview", np.zeros((1, 1, 3), np.uint8), 2)
        shown.close()
    assert told == ["log 2", "show 2", "close"]
    lines = [record.getMessage() for record in caplog.records if record.name == trackers.__name__]
    assert lines == ["tracker left out name=broken reason=ConnectionError: no route to host"]


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(ConfigError, match="--track wandb needs the package wandb: pip install wandb"):
        check_trackers(["tensorboard", "wandb"])
    with pytest.raises(ConfigError, match="--track must be none or some of tensorboard, trackio, wandb, got 'mlflow'"):
        check_trackers(["mlflow"])
    assert check_trackers(["tensorboard", "tensorboard"]) == ("tensorboard",)
    assert check_trackers(["none"]) == ()


def test_only_rank_0_has_trackers(tiny_config: DistillConfig, tmp_path: Path) -> None:
    with RunLog(tmp_path, tiny_config, 0, 60.0, is_rank0=False) as log:
        log.add({"loss": torch.tensor(0.5)})
        log.write(2, 1, 0, 1.0)
        log.validated({"a.b": 1.0}, 2, 0.0)
        log.show(None, 2)
    assert list(tmp_path.iterdir()) == []
