"""`codmd-distill sample-teacher`: killed at any moment it goes on, and runs find what it made."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from polling import wait_until

from distill.cli import main
from distill.config import DistillConfig, config_to_dict
from distill.data import teacher_latents


@pytest.fixture
def settings(tiny_config: DistillConfig) -> list[str]:
    keys = ("base", "prompts", "native", "batch_size", "student_every_iterations", "precision", "optimizer")
    data = config_to_dict(tiny_config)
    return [f"{key}={data[key] if isinstance(data[key], str) else json.dumps(data[key])}" for key in keys]


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.glob("teacher-latents-*/*.safetensors"))}


def test_a_run_finds_the_samples_that_were_made_before(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    start = ["start.updates=2", "start.paths=6", "start.teacher_steps=3"]
    assert main(["sample-teacher", "--method", "dmd", "--cache", str(cache), "--set", *settings, *start]) == 0
    assert "6 samples of the teacher in" in capsys.readouterr().out
    before = shards(cache)
    assert list(before) == ["00000.safetensors"]

    def sampled(*_: object) -> None:
        raise AssertionError("the run samples what is there")

    monkeypatch.setattr(teacher_latents, "_sample_shard", sampled)
    command = ["train", "--method", "codmd", "--out", str(tmp_path / "run"), "--cache", str(cache), "--set"]
    assert main([*command, *settings, *start, "max_iterations=2"]) == 0
    assert shards(cache) == before


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_samples_of_an_undisturbed_job(
    settings: list[str], tmp_path: Path
) -> None:
    more = [*settings, "regression.paths=640", "regression.teacher_steps=2"]

    def command(cache: Path) -> list[str]:
        words = ["sample-teacher", "--method", "regression", "--threads", "1", "--device", "cpu", "--cache", str(cache)]
        return [sys.executable, "-m", "distill.cli", *words, "--set", *more]

    cache = tmp_path / "killed"
    with subprocess.Popen(command(cache), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as job:
        wait_until(lambda: len(shards(cache)) >= 2 or job.poll() is not None, 300.0, "there are two shards")
        job.kill()
    assert job.returncode == -signal.SIGKILL
    made = shards(cache)
    assert 2 <= len(made) < 10
    stamps = {path.name: path.stat().st_mtime_ns for path in cache.glob("teacher-latents-*/*")}
    for folder in (cache, tmp_path / "whole"):
        subprocess.run(command(folder), check=True, capture_output=True)
    assert len(shards(cache)) == 10 and shards(cache) == shards(tmp_path / "whole")
    again = {path.name: path.stat().st_mtime_ns for path in cache.glob("teacher-latents-*/*")}
    assert all(again[name] == stamps[name] for name in made)


def test_two_processes_make_a_share_each(settings: list[str], tmp_path: Path) -> None:
    more = [*settings, "batch_size=4", "regression.paths=192", "regression.teacher_steps=2"]
    words = ["sample-teacher", "--method", "regression", "--threads", "1", "--device", "cpu"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, prefix in (("two", launcher), ("one", [sys.executable, "-m"])):
        command = [*prefix, "distill.cli", *words, "--cache", str(tmp_path / name), "--set", *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    assert list(shards(tmp_path / "two")) == [f"0000{shard}.safetensors" for shard in range(3)]
    assert shards(tmp_path / "two") == shards(tmp_path / "one")


def test_a_run_that_needs_no_samples_is_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample-teacher", "--method", "dmd", "--cache", str(tmp_path), "--set", *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    needing = "rcm, dcm, regression, dmd2, f-distill, avd or vdot"
    assert f"method dmd trains on prompts alone: name --method {needing}" in line
    assert "start.updates=N" in line
