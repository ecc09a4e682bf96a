"""A row survives what fails on its way: too little memory for an opponent, a server that does not start, a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from codmd_serve.bench import against as against_module
from codmd_serve.bench import row as row_module
from codmd_serve.bench.options import BenchConfig
from codmd_serve.bench.row import measure_row
from codmd_serve.errors import GenerationError

ROW = "performance-tiny-codmd-cpu.json"
NUMBERS = "numbers-tiny-codmd-cpu.jsonl"


@pytest.fixture
def config(tiny_bundle: Path) -> BenchConfig:
    return BenchConfig(
        bundle=str(tiny_bundle), device="cpu", pairs=2, teacher_pairs=1, cold_start=False, limit_s=10_000
    )


def row_of(config: BenchConfig, folder: Path) -> dict[str, Any]:
    measure_row(config, folder, "codmd-serve bench")
    assert not (folder / NUMBERS).exists()  # the row has them all
    row: dict[str, Any] = json.loads((folder / ROW).read_text())
    return row


def no_memory(*_: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_opponent_without_memory_leaves_the_row_of_the_engine(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(against_module, "load_bundle", no_memory)
    row = row_of(config, tmp_path)
    assert list(row["contestants"]) == ["ours"] == list(row["operators"])
    assert row["left_out"] == ["what was left of diffusers: OutOfMemoryError: CUDA out of memory"]


def test_what_does_not_fit_together_runs_one_after_the_other(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[bool] = []
    monkeypatch.setattr(against_module, "_both_fit", lambda *_: False)
    load = against_module.load_bundle
    release = against_module.Ours.release

    def loaded(*given: Any) -> Any:
        assert released == [True]  # the engine made room first
        return load(*given)

    monkeypatch.setattr(against_module.Ours, "release", lambda self: (release(self), released.append(True)))
    monkeypatch.setattr(against_module, "load_bundle", loaded)
    row = row_of(config, tmp_path)
    assert row["ratios"]["diffusers"]["total"]["count"] == 2
    assert row["contestants"].keys() == row["operators"].keys() == {"ours", "diffusers"}
    assert row["left_out"][0].startswith("turns: the memory is too small for both")


def test_a_failed_cold_start_does_not_take_the_row_along(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_server(*_: object) -> Any:
        raise GenerationError("the server ended: No module named 'uvicorn'", "cold_start")

    monkeypatch.setattr(row_module, "measure_cold_start", no_server)
    config = BenchConfig(bundle=config.bundle, device="cpu", pairs=1, against="none", limit_s=10_000)
    row = row_of(config, tmp_path)
    assert row["cold_start"] is None and row["contestants"].keys() == {"ours"}
    assert row["left_out"] == ["the cold start: the server ended: No module named 'uvicorn'"]


def test_numbers_are_written_as_they_are_found(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(against_module, "count_operators", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_row(config, tmp_path, "codmd-serve bench")
    found = [json.loads(line) for line in (tmp_path / NUMBERS).read_text().splitlines()]
    assert [entry["name"] for entry in found] == ["load", "ceilings", *["trial"] * 4]
    assert {entry["contestant"] for entry in found[2:]} == {"ours", "diffusers"}
    assert all(entry["total_ms"] > 0 for entry in found[2:])
    assert not (tmp_path / ROW).exists()
