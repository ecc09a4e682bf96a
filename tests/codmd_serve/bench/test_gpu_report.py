"""The report of a lent device, on a CPU: every part runs, and what fails is a line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from codmd_serve.bench import gpu_report
from codmd_serve.bench.gpu_report import GpuReport, measure_device

CPU = torch.device("cpu")


def numbers_of(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text())
    assert content["device"] == "cpu" and content["versions"]["torch"] == torch.__version__
    numbers: list[dict[str, Any]] = content["numbers"]
    return numbers


def test_every_part_runs_where_the_servers_packages_are_missing(tmp_path: Path) -> None:
    path, missing = tmp_path / "report.json", ("fastapi", "uvicorn", "starlette", "pydantic", "gradio", "sqlalchemy")
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({missing}))\n"  # importing one of them fails
        "from codmd_serve.bench.gpu_report import main\n"
        "main(sys.argv[1:])\n"
    )
    words = ["--out", str(path), "--preset", "tiny", "--device", "cpu", "--limit-s", "10000"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = numbers_of(path)
    assert [entry for entry in numbers if "error" in entry or "skipped" in entry] == []
    names = [entry["name"] for entry in numbers]
    assert list(dict.fromkeys(names)) == [
        "decode",
        "decode-graph",
        "decode-psnr",
        "build",
        "attention-chosen",
        "step",
        "step-plain",
        "loop",
        "text-to-mp4",
        "requests",
        "ceilings",
        "attention",
        "diffusers-step",
        "diffusers-decode",
        "step-fp8",
        "step-fp8-compiled",
        "end",
    ]
    assert names.count("text-to-mp4") == 4
    assert [entry["overlap"] for entry in numbers if entry["name"] == "requests"] == [False, True, False, True]
    assert all(entry["ms"] > 0 for entry in numbers if "ms" in entry)
    graph = next(entry for entry in numbers if entry["name"] == "decode-graph")
    assert graph["equal"] and graph["execution"] == "eager"
    assert graph["fallback"].endswith("RuntimeError: CUDA graphs need a CUDA device, got cpu")


def test_the_whole_report_fits_in_eight_minutes() -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    recipe = makefile[makefile.index("gpu-report:\n") :].split("\n\n")[0]
    (limit_s,) = (float(text) for text in re.findall(r"--limit-s (\d+)", recipe))
    stops_s = [float(text) for text in re.findall(r"timeout (\d+)", recipe)]
    assert len(stops_s) == recipe.count("$(GPU_PYTHON)"), "everything that runs is stopped"
    assert sum(gpu_report.PARTS.values()) <= limit_s < stops_s[0]
    assert sum(stops_s) < 480


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
        "overlap",
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
