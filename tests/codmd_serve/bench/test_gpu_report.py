"""The report of a lent device, on a CPU: every part runs, and what fails is a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from codmd_serve.bench import gpu_report
from codmd_serve.bench.gpu_report import GpuReport, main, measure_device

CPU = torch.device("cpu")


def numbers_of(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text())
    assert content["device"] == "cpu" and content["versions"]["torch"] == torch.__version__
    numbers: list[dict[str, Any]] = content["numbers"]
    return numbers


def test_every_part_runs(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert main(["--out", str(path), "--preset", "tiny", "--device", "cpu", "--limit-s", "10000"]) == 0
    numbers = numbers_of(path)
    names = [entry["name"] for entry in numbers]
    assert list(dict.fromkeys(names)) == [
        "decode",
        "decode-psnr",
        "build",
        "attention-chosen",
        "step",
        "step-plain",
        "loop",
        "text-to-mp4",
        "ceilings",
        "attention",
        "diffusers-step",
        "diffusers-decode",
        "fp8",
        "end",
    ]
    failed = [entry for entry in numbers if "error" in entry]
    assert [(entry["name"], entry["error"]) for entry in failed] == [
        ("fp8", "RuntimeError: needs a CUDA device and the transformer")
    ]
    assert names.count("text-to-mp4") == 4
    assert all(entry["ms"] > 0 for entry in numbers if "ms" in entry)


def test_what_fails_is_a_line_and_the_next_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_report, "StreamingDecoder", short_of_memory)
    measure_device(tmp_path / "report.json", "tiny", CPU, limit_s=10_000)
    entries = {entry["name"]: entry for entry in numbers_of(tmp_path / "report.json")}
    assert entries["vae"]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert entries["step"]["ms"] > 0 and entries["diffusers-decode"]["ms"] > 0


def test_no_part_is_begun_without_time_for_it(tmp_path: Path) -> None:
    measure_device(tmp_path / "report.json", "tiny", CPU, limit_s=0.0)
    numbers = numbers_of(tmp_path / "report.json")
    assert [entry["name"] for entry in numbers if "skipped" in entry] == [
        "vae",
        "transformer",
        "end_to_end",
        "ceilings",
        "attention",
        "diffusers",
        "fp8",
    ]
    assert numbers[-1]["name"] == "end"


def test_each_number_is_on_disk_when_it_is_found(tmp_path: Path) -> None:
    report = GpuReport(tmp_path / "report.json", CPU, 100.0)
    report.tell("one", ms=1.0)
    assert [entry["name"] for entry in numbers_of(tmp_path / "report.json")] == ["one"]
    with report.part("broken", 1.0):
        raise ValueError("no")
    assert numbers_of(tmp_path / "report.json")[1] | {"at_s": 0} == {
        "at_s": 0,
        "name": "broken",
        "error": "ValueError: no",
    }
