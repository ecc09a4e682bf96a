"""The start of a server, seen from outside: seconds to /ready, and memory that was there at the highest point."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codmd_serve.bench.cold import host_peak_bytes, measure_cold_start
from codmd_serve.errors import GenerationError

CPU = torch.device("cpu")
SIZE = 100 * 2**20


def test_peak_memory_counts_what_was_given_back_and_children() -> None:
    child = f"import sys; block = b'1' * {SIZE}; del block; print('x', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.read(1)
    peak = host_peak_bytes(process.pid)
    process.stdin.close()
    process.stdout.close()
    process.wait()
    assert SIZE < peak < 2 * SIZE
    assert host_peak_bytes(process.pid) == 0


def test_cold_start_ends_at_ready(tiny_bundle: Path, tiny_base: Path) -> None:
    folders = [tiny_bundle / "transformer", tiny_base / "vae"]
    cold = measure_cold_start(tiny_bundle, folders, CPU, torch.float32, timeout_s=600)
    assert cold.ready_s > 0 and cold.device_peak_bytes is None
    assert cold.weights_bytes == sum(next(folder.glob("*.safetensors")).stat().st_size for folder in folders)
    assert cold.host_peak_bytes is not None and cold.host_peak_bytes > cold.weights_bytes


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"was not ready: .*no student bundle at"):
        measure_cold_start(tmp_path / "gone", [], CPU, torch.float32, timeout_s=600)
