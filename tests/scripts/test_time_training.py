"""The timing program runs the Wan recipes' own code path, scaled down, on a CPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).resolve().parents[2] / "scripts" / "time_training.py"
TINY = ["--scale", "12", "--set", "native.height=32", "native.width=32", "native.num_frames=5"]


def timed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    spec = importlib.util.spec_from_file_location("time_training", PROGRAM)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.main(list(arguments))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("settings", [[], ["lora_critic_rank=4", "accumulate=2"]])
def test_scaled_down_wan_1_3b_trains_on_a_cpu(capsys: pytest.CaptureFixture[str], settings: list[str]) -> None:
    given = [*TINY, "student_every_iterations=2", *settings]
    result = timed(capsys, "--device", "cpu", "--batch-size", "2", "--iterations", "2", *given)
    assert result["updates"] == {"student": 1, "critic": 2}
    assert result["num_skipped"] == 0
    assert (result["recipe"], result["method"], result["precision"]) == ("wan_1_3b", "codmd", "bf16")
    assert result["latents"] == [16, 2, 4, 4]
    assert len(result["student_and_critic_s"]) == len(result["critic_only_s"]) == 1
    assert result["peak_memory_gib"] > 0


@pytest.mark.gpu
def test_full_size_wan_1_3b_iteration_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    result = timed(capsys, "--device", "cuda", "--iterations", "2", "--set", "student_every_iterations=2")
    with capsys.disabled():
        print(json.dumps(result))
    assert result["updates"] == {"student": 1, "critic": 2}
    assert result["parameters"] == pytest.approx(1.42e9, rel=0.01)
    assert result["peak_memory_gib"] < torch.cuda.get_device_properties(0).total_memory / 1024**3
