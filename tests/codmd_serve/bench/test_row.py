"""A whole row on the tiny bundle: what is written, that its numbers follow from its own trials, and equal work."""

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from codmd_serve.bench.contestants import STAGES, TEACHER_STEPS, Diffusers, Ours, student_scheduler, teacher_scheduler
from codmd_serve.bench.options import BenchConfig
from codmd_serve.bench.report import TARGETS, document, is_met, short_table, targets_of
from codmd_serve.bench.row import measure_row
from codmd_serve.bench.trials import count_operators
from codmd_serve.bench.weights import PROMPTS
from codmd_serve.config import GenerateParams
from codmd_serve.errors import ConfigError, GenerationError
from codmd_serve.loading import load_engine
from codmd_serve.wan.checkpoint import StudentSpec, load_bundle, save_bundle

PARAMS = GenerateParams(prompt=PROMPTS[0], seed=3, height=32, width=32, num_frames=9, fps=16, crf=1)


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchConfig, Path, str]:
    """The settings, the folder of results, and what the command printed."""
    folder = tmp_path_factory.mktemp("results")
    config = BenchConfig(
        bundle=str(tiny_bundle), device="cpu", pairs=3, teacher_pairs=1, cold_start=False, limit_s=10_000
    )
    return config, folder, measure_row(config, folder, "codmd-serve bench")


@pytest.fixture
def row(measured: tuple[BenchConfig, Path, str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((measured[1] / "performance-tiny-codmd-cpu.json").read_text())
    return loaded


def test_row_writes_json_table_and_picture(measured: tuple[BenchConfig, Path, str], row: dict[str, Any]) -> None:
    _, folder, printed = measured
    names = ["performance-tiny-codmd-cpu.json", "performance-tiny-codmd-cpu.png", "performance.md"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert row["contestants"].keys() == {"ours", "diffusers", "teacher"}
    assert [entry["num_forwards"] for entry in row["contestants"].values()] == [4, 4, 2 * TEACHER_STEPS]
    for entry in row["contestants"].values():
        assert tuple(entry["stages_ms"]) == STAGES and entry["total_ms"]["median"] > 0
    assert row["request"]["num_frames"] == 9 and row["machine"]["device"] == "cpu" and row["left_out"] == []
    assert (
        row["versions"]["torch"] == torch.__version__.partition("+")[0] or row["versions"]["torch"] == torch.__version__
    )
    text = (folder / "performance.md").read_text()
    for part in ("## tiny-codmd-cpu", "`codmd-serve bench`", row["date"], "Operator calls per request", "| total |"):
        assert part in text
    assert printed.startswith("tiny-codmd-cpu: 32x32, 9 frames, 4 steps") and "| denoise |" in printed
    with Image.open(folder / row["picture"]) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**16)}  # type: ignore[union-attr]
    assert {(0, 90, 181), (220, 50, 32)} <= colours


def test_ratios_follow_from_the_pairs_of_the_same_run(row: dict[str, Any]) -> None:
    for other, pairs in row["pairs"].items():
        ratios = [pair["other"]["total_ms"] / pair["ours"]["total_ms"] for pair in pairs]
        assert row["ratios"][other]["total"]["median"] == pytest.approx(statistics.median(ratios))
        cpu = [pair["other"]["cpu_ms"] / pair["ours"]["cpu_ms"] for pair in pairs]
        assert row["ratios"][other]["cpu"]["median"] == pytest.approx(statistics.median(cpu))
        assert row["ratios"][other]["total"]["count"] == len(pairs) == {"diffusers": 3, "teacher": 1}[other]
    ours = [pair["ours"]["total_ms"] for pair in row["pairs"]["diffusers"]]
    assert row["contestants"]["ours"]["total_ms"]["median"] == pytest.approx(statistics.median(ours))


def test_floor_follows_from_work_and_ceilings(row: dict[str, Any]) -> None:
    ceilings = row["ceilings"]
    for stage in ("text", "denoise", "decode"):
        work = row["work"][stage]
        floor_s = max(work["flop"] / ceilings["flop_per_s"], work["num_bytes"] / ceilings["bytes_per_s"])
        assert work["floor_ms"] == pytest.approx(1000 * floor_s)
    assert row["work"]["denoise"]["flop"] % row["request"]["num_steps"] == 0


def test_stages_make_up_the_total(row: dict[str, Any]) -> None:
    for pair in row["pairs"]["diffusers"]:
        for trial in (pair["ours"], pair["other"]):
            assert 0.5 * trial["total_ms"] < sum(trial["stages_ms"].values()) <= trial["total_ms"] + 0.001


def test_a_row_is_resumed_only_for_the_same_versions(
    measured: tuple[BenchConfig, Path, str], row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder, printed = measured

    def refuse(*_: object) -> None:
        raise GenerationError("measures again")

    monkeypatch.setattr("codmd_serve.bench.row._measured", refuse)
    resumed = replace(config, resume=True)
    assert measure_row(resumed, folder, "codmd-serve bench --resume") == printed
    (tmp_path / "performance-tiny-codmd-cpu.json").write_text(json.dumps({**row, "versions": {"torch": "0.1"}}))
    for again, results in ((resumed, tmp_path), (config, folder)):
        with pytest.raises(GenerationError, match="measures again"):
            measure_row(again, results, "codmd-serve bench")


def test_a_shape_that_the_bundle_cannot_make_is_refused(
    measured: tuple[BenchConfig, Path, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"multiples of 16 and 4k \+ 1 frames, got 32, 32 and 6"):
        measure_row(replace(measured[0], num_frames=6), tmp_path, "codmd-serve bench")


def test_targets_are_judged_by_the_row_they_are_for(row: dict[str, Any]) -> None:
    assert targets_of(row) == []
    ratio = {"total": {**row["ratios"]["diffusers"]["total"], "median": 1.4}}
    ours = {
        **row,
        "name": "shapeworld-dmd",
        "ratios": {**row["ratios"], "diffusers": {**row["ratios"]["diffusers"], **ratio}},
    }
    ((target, value),) = targets_of(ours)
    assert (target.bar, value, is_met(target, 1.4), is_met(target, 3.0)) == (3.0, 1.4, False, True)
    free, busy = ({**ours, "machine": {**ours["machine"], "is_busy": is_busy}} for is_busy in (False, True))
    assert "1.4 x | missed: " in short_table(free)
    assert "1.4 x | on a busy machine, to be made again: missed: " in short_table(busy)
    large = {**row, "name": "wan-1.3b", "machine": {**row["machine"], "device": "NVIDIA H200"}}
    assert len(targets_of(large)) == len([target for target in TARGETS if target.name == "wan-1.3b"]) == 5
    total_s = row["contestants"]["ours"]["total_ms"]["median"] / 1000
    assert targets_of(large)[0][1] == pytest.approx(total_s)
    assert document([large]).count("| target | bar |") == 1


def test_operator_counts_repeat_and_ours_are_fewer(row: dict[str, Any], tiny_bundle: Path, tmp_path: Path) -> None:
    ours = Ours(load_engine(tiny_bundle, "cpu"))
    ours.run(PARAMS, tmp_path / "a.mp4")
    counts = [count_operators(ours, replace(PARAMS, prompt=PROMPTS[n]), tmp_path / "a.mp4").calls for n in (1, 2)]
    assert counts[0] == counts[1] == row["operators"]["ours"]["calls"]
    assert counts[0] < row["operators"]["diffusers"]["calls"]
    shares = [share for _, _, share in row["operators"]["ours"]["top"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.0001


def test_diffusers_makes_the_video_that_we_make(
    tiny_pipeline: WanPipeline, tiny_base: Path, tiny_spec: StudentSpec, tmp_path: Path, read_video: Any
) -> None:
    # Without fresh noise between steps both start from the same numbers and have to end at the same frames.
    path = tmp_path / "tiny-ode"
    shutil.copytree(tiny_base, tmp_path / tiny_base.name)  # the bundle names its base by a path relative to itself
    sigmas = (1.0, 0.75, 0.5, 0.25, 0.0)
    spec = replace(tiny_spec, sampler="ode", sigmas=sigmas, timesteps=tuple(1000 * sigma for sigma in sigmas[:-1]))
    save_bundle(path, tiny_pipeline.transformer, spec)
    Ours(load_engine(path, "cpu")).run(PARAMS, tmp_path / "ours.mp4")
    stock = Diffusers(load_bundle(path), student_scheduler(spec), 4, 1.0)
    stock.run(PARAMS, tmp_path / "stock.mp4")
    ours, theirs = (read_video(tmp_path / name).frames.astype(np.int32) for name in ("ours.mp4", "stock.mp4"))
    assert ours.shape == theirs.shape and ours.std() > 1
    assert np.abs(ours - theirs).mean() < 0.5  # rounding of sums, then of the encoder


def test_teacher_runs_twice_per_step_with_guidance(tiny_bundle: Path, tmp_path: Path) -> None:
    stock = load_bundle(tiny_bundle)
    calls = []
    stock.transformer.register_forward_hook(lambda *_: calls.append(1))
    teacher = Diffusers(stock, teacher_scheduler(), 3, 5.0)
    teacher.run(PARAMS, tmp_path / "a.mp4")
    assert len(calls) == teacher.num_forwards == 6
