"""Fused kernels: by Triton's interpreter against the plain code, and what happens where Triton is missing or broken."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codmd_serve.wan import fused, rows

CASES = Path(__file__).with_name("triton_cases.py")
CUDA = torch.device("cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which the extra dev installs")
def test_the_kernels_equal_the_plain_code() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(CASES)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "24 cases"


def test_a_cpu_runs_the_plain_code_without_a_word() -> None:
    assert fused.choose_add_norm_silu(torch.device("cpu"), torch.float32) == (fused.add_norm_silu, "")
    assert rows.choose_rows(torch.device("cpu"), torch.float32) == (rows.PLAIN, "")


def test_without_triton_the_plain_code_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run, problem = fused.choose_add_norm_silu(CUDA, torch.float16)
    assert (run, problem) == (fused.add_norm_silu, "VAE norms unfused: no package triton")
    assert rows.choose_rows(CUDA, torch.bfloat16) == (rows.PLAIN, "norms unfused: no package triton")


def test_a_broken_compiler_leaves_the_plain_code_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("ptxas not found\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(fused, "_self_test", broken)
    monkeypatch.setattr(rows, "self_test", broken)
    run, problem = fused.choose_add_norm_silu(CUDA, torch.float16)
    assert (run, problem) == (fused.add_norm_silu, "VAE norms unfused: RuntimeError: ptxas not found")
    assert rows.choose_rows(CUDA, torch.bfloat16) == (rows.PLAIN, "norms unfused: RuntimeError: ptxas not found")


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_wrong_numbers_leave_the_plain_code(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(fused, "_self_test", lambda *_: error)
    monkeypatch.setattr(rows, "self_test", lambda *_: error)
    assert fused.choose_add_norm_silu(CUDA, torch.float16)[0] is fused.add_norm_silu
    ops, problem = rows.choose_rows(CUDA, torch.bfloat16)
    assert ops is rows.PLAIN and problem.startswith("norms unfused: the Triton kernels are")
    monkeypatch.setattr(fused, "_self_test", lambda *_: 0.0)
    monkeypatch.setattr(rows, "self_test", lambda *_: 0.0)
    assert fused.choose_add_norm_silu(CUDA, torch.float16) == (fused.add_norm_silu_triton, "")
    assert rows.choose_rows(CUDA, torch.bfloat16) == (rows.FUSED, "")


def test_the_self_test_of_rows_finds_no_difference_between_the_plain_code_and_itself() -> None:
    assert rows.self_test(rows.PLAIN, torch.device("cpu"), torch.bfloat16) == 0.0
    wrong = rows.RowOps(rows.add_norm, rows.norm_rotate, lambda layer, features: layer(features), False)
    assert rows.self_test(wrong, torch.device("cpu"), torch.float32) > rows.ROW_TOLERANCE[torch.float32]
