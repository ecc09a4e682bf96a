"""Compiling ahead: eager until the child is done, compiled then, eager for ever when either fails."""

import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from torch import nn

from distill.pretrain import compiling
from distill.pretrain.compiling import BlockCompiler, CompileJob, compile_ahead
from distill.pretrain.config import TransformerConfig

JOB = CompileJob(
    config=TransformerConfig(num_heads=1, head_dim=32, num_layers=3, ffn_dim=32),
    latent_shape=(2, 4, 1, 2, 2),
    prompt_shape=(2, 8, 16),
    precision="fp32",
    device="cpu",
)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])


def child(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code])


def wait_for(process: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
    process.wait(60)
    return process


def test_blocks_run_eager_until_the_child_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(compiling, "compile_blocks", compiled.append)
    monkeypatch.setattr(compiling, "POLL_EVERY_CALLS", 1)
    process, network = child("input()"), Blocks()
    process.kill()
    waiting = child("import time; time.sleep(600)")
    compiler = BlockCompiler(waiting)
    assert compiler.call(network, lambda: torch.ones(1)) == 1 and compiled == []
    assert compiler.state == "waiting"
    waiting.kill()
    waiting.wait()
    assert compiler.call(network, lambda: torch.ones(1)) == 1
    assert (compiler.state, compiled) == ("eager", [])  # a child that was killed has compiled nothing
    done = BlockCompiler(wait_for(child("pass")))
    assert done.call(network, lambda: torch.ones(1)) == 1
    assert (done.state, compiled) == ("compiled", [network])
    process.wait()


def test_a_failed_compilation_leaves_the_blocks_eager(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, compiler, calls = Blocks(), BlockCompiler(), []
    monkeypatch.setattr(compiling, "compile_blocks", lambda n: setattr(n.blocks[0], "_compiled_call_impl", print))

    def predict() -> torch.Tensor:
        calls.append(network.blocks[0]._compiled_call_impl is not None)
        if calls[-1]:
            raise RuntimeError("no compiler\nand a long story")
        return torch.ones(1)

    assert compiler.call(network, predict) == 1
    assert calls == [True, False]
    assert compiler.state == "eager"
    assert "could not be compiled" in caplog.text and "no compiler" in caplog.text
    compiler.call(network, predict)
    assert calls == [True, False, False]


def test_leaving_ends_a_child_that_still_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.sys, "executable", "/bin/sleep")
    monkeypatch.setattr(compiling.json, "dumps", lambda _: "600")
    real = subprocess.Popen
    started = []

    def popen(command, **options):
        started.append(real(["/bin/sleep", "600"], **options))
        return started[-1]

    monkeypatch.setattr(compiling.subprocess, "Popen", popen)
    start = time.monotonic()
    with compile_ahead(JOB) as compiler:
        assert compiler.state == "waiting"
    assert started[0].returncode is not None
    assert time.monotonic() - start < 60


def test_the_child_trains_one_block_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compile_blocks(transformer):
        seen.append(transformer)

    monkeypatch.setattr(compiling, "compile_blocks", compile_blocks)
    threads = torch.get_num_threads()
    try:
        assert compiling.main([json.dumps(asdict(JOB))]) == 0
    finally:
        torch.set_num_threads(threads)
    (transformer,) = seen
    assert len(transformer.blocks) == 1
    # Its backward pass has run: the last projection is silent only in a fresh network's input.
    assert all(weight.grad is not None for weight in transformer.blocks[0].parameters())
