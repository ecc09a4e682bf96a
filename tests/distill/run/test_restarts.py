"""Runs in several processes that are stopped, or whose disk is full, go on in any number of processes as if nothing
had been; all processes end together and say why.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import whole_state
from polling import wait_until

from distill.config import DistillConfig, config_to_dict, with_overrides
from distill.run.checkpoint import list_checkpoints, load_checkpoint, read_config
from distill.run.trainer import RunOptions, run_training

ROOT = Path(__file__).resolve().parents[3]
NUM_STEPS = 4
# The relational term is most of the loss. Keys have a bias whose gradient is 0 but for rounding: Adam would make
# updates of full size of that, and with eps .01 of the rounding of large gradients some that the bounds do not take.
SETTINGS = ["batch_size=4", "student_every_iterations=1", "copula.scale=20", "optimizer.eps=0.1", "keep_last=9"]
# name: (processes, steps, the run that it goes on with, what happens to it)
RUNS: dict[str, tuple[int, int, str, str]] = {
    "whole": (1, NUM_STEPS, "", ""),
    "two": (2, 2, "", ""),
    "two-then-one": (1, NUM_STEPS, "two", ""),
    "two-then-four": (4, NUM_STEPS, "two", ""),
    "one": (1, 2, "", ""),
    "one-then-two": (2, NUM_STEPS, "one", ""),
    "four": (4, 1, "", ""),
    "four-then-two": (2, 3, "four", ""),
    "four-two-one": (1, NUM_STEPS, "four-then-two", ""),
    "one-then-hsdp": (4, 3, "one", ""),
    "hsdp-then-two": (2, NUM_STEPS, "one-then-hsdp", ""),
    "signalled": (2, NUM_STEPS, "", "sigterm"),
    "signalled-then-two": (2, NUM_STEPS, "signalled", ""),
    "full": (2, NUM_STEPS, "two", "full disk"),
    "full-then-two": (2, NUM_STEPS, "full", ""),
    "broken": (2, NUM_STEPS, "two", "bug"),
}
# Two replicas of two shards, then shards over all.
LAYOUTS = {"one-then-hsdp": ["--set", "shard_group=2"], "hsdp-then-two": ["--set", "shard_group=0"]}
RESUMED = (
    "two-then-one",
    "two-then-four",
    "one-then-two",
    "four-two-one",
    "hsdp-then-two",
    "signalled-then-two",
    "full-then-two",
)


def settings_of(config: DistillConfig) -> list[str]:
    """The settings in which a config differs from the recipe, for the command line."""
    keys = ("base", "prompts", "native", "save_every_iterations", "precision", "optimizer", "copula")
    data = config_to_dict(config)
    given = [f"{key}={data[key] if isinstance(data[key], str) else json.dumps(data[key])}" for key in keys]
    return [*given, *SETTINGS]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    # Errors only, so that what a process says is its one line.
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CODMD_LOG_LEVEL": "ERROR"}


@pytest.fixture(scope="module")
def folder(tiny_config: DistillConfig, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all RUNS, and what each of their processes said."""
    out = tmp_path_factory.mktemp("restarts")
    common = ["--device", "cpu", "--preview-every", "0", "--cache", str(out / "cache")]
    wanted = []
    for name, (world_size, steps, copy_of, accident) in RUNS.items():
        start = ["--resume"] if copy_of else ["--set", *settings_of(tiny_config)]
        start += LAYOUTS.get(name, [])
        arguments = ["--out", str(out / name), "--max-iterations", str(steps), *common, *start]
        wanted.append(
            {
                "name": name,
                "world_size": world_size,
                "arguments": arguments,
                "copy_of": copy_of,
                "accident": accident,
            }
        )
    (out / "runs.json").write_text(json.dumps(wanted), encoding="utf-8")
    script = str(Path(__file__).with_name("run_restarts.py"))
    command = [sys.executable, script, str(out / "runs.json"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def said(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(RUNS[name][0])]


def steps_of(run: Path) -> list[str]:
    return [path.name for path in sorted((run / "checkpoints").iterdir())]


def tensors(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts, by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        found |= tensors(value, f"{prefix}/{key}")
    return found


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_any_number_of_processes_ends_as_the_one_that_nobody_stopped(folder: Path, name: str) -> None:
    assert [one["code"] for one in said(folder, name)] == [0] * RUNS[name][0], said(folder, name)
    got, want = (whole_state(folder / run / "checkpoints/step-00000004") for run in (name, "whole"))
    for part in ("networks", "ema"):
        ours, theirs = (tensors(state[part]) for state in (got, want))
        assert ours.keys() == theirs.keys() and ours
        for key, tensor in theirs.items():
            torch.testing.assert_close(
                ours[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key} {text}"
            )
    assert got["updates"] == want["updates"] == {"student": 4, "critic": 4}


def test_what_is_compared_has_moved_since_it_was_resumed(folder: Path) -> None:
    """By 10 times what it may differ by, so that it is not simply the checkpoint."""
    before, after = (whole_state(folder / "whole/checkpoints" / f"step-0000000{step}") for step in (2, 4))
    for role in ("student", "critic"):
        old, new = (state["networks"][role] for state in (before, after))
        assert max(float((new[key] - old[key]).abs().max()) for key in old) > 1e-4


def stored_bytes(folder: Path) -> dict[str, int]:
    """The bytes of tensors in each file of a checkpoint."""
    index = load_checkpoint(folder).index
    assert index is not None
    sizes: dict[str, int] = {}
    for stored in index.tensors.values():
        for part in stored.parts:
            sizes[part.file] = sizes.get(part.file, 0) + math.prod(part.sizes) * stored.dtype.itemsize
    return sizes


def test_replicas_share_out_a_checkpoint_and_write_every_shard_once(folder: Path) -> None:
    whole = stored_bytes(folder / "one" / "checkpoints" / "step-00000002")
    shares = stored_bytes(folder / "one-then-hsdp" / "checkpoints" / "step-00000003")
    assert (len(whole), len(shares)) == (1, 4)
    assert sum(shares.values()) == sum(whole.values())
    assert max(shares.values()) < 0.3 * sum(whole.values())


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder: Path) -> None:
    """With the exit code and the checkpoint that one process alone leaves."""
    first, last = said(folder, "signalled")
    assert first["code"] == last["code"] == 128 + signal.SIGTERM
    assert "interrupted after 3 iterations" in first["error"]
    assert "interrupted" not in last["error"]
    assert steps_of(folder / "signalled") == ["step-00000002", "step-00000003"]
    assert not (folder / "signalled" / "bundle").exists()


def test_a_full_disk_ends_all_processes_with_the_same_message(folder: Path) -> None:
    for one in said(folder, "full"):
        assert one["code"] == 2
        assert one["error"].startswith("codmd-distill: checkpoint ") and one["error"].count("\n") == 1
        assert "step-00000004 cannot be written" in one["error"]
    assert steps_of(folder / "full") == ["step-00000002"]


def test_an_unexpected_error_of_the_first_process_reaches_the_others(folder: Path) -> None:
    for one in said(folder, "broken"):
        assert one["code"] == 2
        assert one["error"].startswith("codmd-distill: checkpoint ") and one["error"].count("\n") == 1
        assert one["error"].endswith("step-00000004 cannot be written: ZeroDivisionError: nobody thought of this\n")
    assert steps_of(folder / "broken") == ["step-00000002"]


def test_torchrun_hands_a_sigterm_on_and_the_run_can_be_resumed(
    tiny_config: DistillConfig, environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--shutdown-timeout", "240"]
    launcher += ["-m", "distill.cli"]
    endless = ["--max-iterations", "1000000", "--device", "cpu", "--preview-every", "0"]
    settings = [*settings_of(tiny_config), "save_every_iterations=1000000", "log_every_iterations=1"]
    command = [sys.executable, "-m", *launcher, "train", "--out", str(out), *endless, "--set", *settings]
    with (tmp_path / "said").open("w") as file:
        running = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=file, stderr=file)
        try:
            wait_until(lambda: (out / "log.jsonl").exists() or running.poll() is not None, 300, "a first log line")
            running.send_signal(signal.SIGTERM)
            running.wait(timeout=300)
        finally:
            running.kill()
    text = (tmp_path / "said").read_text()
    assert text.count("interrupted after") == 1, text[-4000:]
    (only,) = list_checkpoints(out)
    iteration = load_checkpoint(only).values["iteration"]
    assert only.name == f"step-{iteration:08d}"
    options = RunOptions(out=out, device=torch.device("cpu"), preview_every_iterations=0)
    longer = with_overrides(read_config(out), [f"max_iterations={iteration + 1}"])
    assert run_training(longer, options, resume=True).bundle
