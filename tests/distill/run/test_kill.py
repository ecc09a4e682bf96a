"""Runs that are killed or out of disk at a chosen moment go on from their last checkpoint as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import whole_state

from codmd_serve.errors import CheckpointError
from distill.config import DistillConfig, config_to_dict, with_overrides
from distill.parallel import shard_files
from distill.run import saver
from distill.run.checkpoint import list_checkpoints, load_checkpoint
from distill.run.trainer import RunOptions, run_training

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_config: DistillConfig) -> DistillConfig:
    # One checkpoint only: the previous one has to outlive the next save.
    return with_overrides(tiny_config, ["keep_last=1"])


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(config: DistillConfig, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_training(config, RunOptions(out=out, device=CPU, cache_dir=cache_dir, preview_every_iterations=0), resume=False)
    return out


def write_to_full_disk(_file: object, view: memoryview) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        full.write(view)


def assert_resumes_to(whole: Path, out: Path, config: DistillConfig, cache_dir: Path) -> None:
    """Go on with the run in `out`; every tensor and number of its end, and its bundle, must be those of `whole`."""
    outcome = run_training(
        config, RunOptions(out=out, device=CPU, cache_dir=cache_dir, preview_every_iterations=0), resume=True
    )
    assert outcome.iteration == config.max_iterations
    states = [whole_state(list_checkpoints(folder)[-1]) for folder in (whole, out)]
    assert_same(*states)
    name = Path("bundle", "transformer", "diffusion_pytorch_model.safetensors")
    assert (whole / name).read_bytes() == (out / name).read_bytes()
    # What the killed save had begun is gone.
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000006"]


def assert_same(left: object, right: object) -> None:
    if isinstance(left, dict):
        assert isinstance(right, dict) and left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert isinstance(right, list | tuple)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor) and torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize(
    ("moment", "left_step"),
    [("writing", 2), ("written", 2), ("indexed", 2), ("named", 4), ("deleting", 4), ("training", 2)],
)
def test_killed_run_goes_on_bit_for_bit(
    config: DistillConfig, cache_dir: Path, whole: Path, tmp_path: Path, moment: str, left_step: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)), encoding="utf-8")
    script = str(Path(__file__).with_name("killed_run.py"))
    done = subprocess.run(
        [sys.executable, script, str(tmp_path / "config.json"), str(tmp_path / "run"), str(cache_dir), moment],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert newest.name == f"step-{left_step:08d}"
    assert load_checkpoint(newest).values["iteration"] == left_step
    assert_resumes_to(whole, tmp_path / "run", config, cache_dir)


def test_full_disk_stops_the_run_and_spares_the_checkpoint_before(
    config: DistillConfig, cache_dir: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own error: the shard of iteration 4 goes to a device that is always full."""
    save = saver.save_checkpoint

    def save_to_full_disk(run_dir: Path, iteration: int, *args: object) -> Path:
        with monkeypatch.context() as patch:
            if iteration == 4:
                patch.setattr(shard_files, "write_all", write_to_full_disk)
            return save(run_dir, iteration, *args)

    with monkeypatch.context() as patch:
        patch.setattr(saver, "save_checkpoint", save_to_full_disk)
        with pytest.raises(CheckpointError, match=r"step-00000004 cannot be written"):
            run_training(
                config,
                RunOptions(out=tmp_path / "run", device=CPU, cache_dir=cache_dir, preview_every_iterations=0),
                resume=False,
            )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert_resumes_to(whole, tmp_path / "run", config, cache_dir)
