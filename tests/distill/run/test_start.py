"""A run with a regressed start: two stages, each resumed where it was, and the same student as without a stop."""

import os
import signal
from pathlib import Path

import pytest
import torch

from codmd_serve.errors import ConfigError
from codmd_serve.wan.checkpoint import read_spec
from distill.config import DistillConfig, with_overrides
from distill.networks.base import open_base
from distill.run import start as stage
from distill.run.start import run_with_start
from distill.run.trainer import RunOptions, Trainer

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_config: DistillConfig) -> DistillConfig:
    return with_overrides(
        tiny_config, ["start.updates=4", "start.paths=5", "start.teacher_steps=3", "max_iterations=4"]
    )


def weights(folder: Path) -> bytes:
    return (folder / "bundle" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_the_method_goes_on_from_where_the_start_ended(config: DistillConfig, tmp_path: Path) -> None:
    seen = []
    original = stage.run_training

    def noted(own: DistillConfig, *args: object, **more: object) -> object:
        seen.append((own.method, more.get("started")))
        return original(own, *args, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run_training", noted)
        outcome = run_with_start(config, RunOptions(out=tmp_path / "run", device=CPU), resume=False)
    started = tmp_path / "run" / "start" / "bundle"
    assert seen == [("regression", None), ("codmd", started)]
    assert outcome.iteration == 4 and outcome.bundle == tmp_path / "run" / "bundle"
    assert read_spec(outcome.bundle).method == "codmd" and read_spec(started).step == 4
    base = open_base(config.base).load_transformer(torch.float32)
    assert weights(tmp_path / "run" / "start") != weights(tmp_path / "run")
    assert base is not None and not (tmp_path / "run" / "start" / "pipeline").exists()
    with pytest.raises(ConfigError, match="already holds a run"):
        run_with_start(config, RunOptions(out=tmp_path / "run", device=CPU), resume=False)


@pytest.mark.parametrize("role", ["critic", "student"])
def test_stopped_in_either_stage_and_resumed_it_equals_an_unbroken_run(
    config: DistillConfig, tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_with_start(config, RunOptions(out=tmp_path / "whole", device=CPU), resume=False)
    options = RunOptions(out=tmp_path / "broken", device=CPU, cache_dir=tmp_path / "whole" / "cache")
    original = Trainer.iterate

    def stopped(self: Trainer) -> dict[str, torch.Tensor]:
        # In the start only the student has a turn.
        if self.iteration == 2 and (self.config.method == "regression") == (role == "student"):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Trainer, "iterate", stopped)
    outcome = run_with_start(config, options, resume=False)
    assert outcome.bundle is None and outcome.signal_number == signal.SIGTERM
    monkeypatch.undo()
    outcome = run_with_start(config, options, resume=True)
    assert outcome.iteration == whole.iteration == 4
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_the_time_budget_is_that_of_both_stages(config: DistillConfig, tmp_path: Path) -> None:
    config = with_overrides(config, ["max_iterations=100000"])
    outcome = run_with_start(config, RunOptions(out=tmp_path / "run", device=CPU, minutes=1e-4), resume=False)
    # The start used all of it.
    assert outcome.iteration == 0 and outcome.bundle is not None
    assert (tmp_path / "run" / "start" / "bundle" / "student.json").is_file()
