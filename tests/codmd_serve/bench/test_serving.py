"""The serving row on the tiny bundle behind a real server, and what its numbers are made of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from codmd_serve.bench.options import BenchConfig
from codmd_serve.bench.report import document, serving_lines
from codmd_serve.bench.row import measure_row
from codmd_serve.bench.serving import run_in_a_row, run_overlapped
from codmd_serve.bench.timeline import BAR_COLOURS, LANES, draw_timeline, overlap_s
from codmd_serve.bench.weights import PROMPTS
from codmd_serve.config import GenerateParams
from codmd_serve.errors import ConfigError
from codmd_serve.loading import load_engine

PARAMS = GenerateParams(prompt=PROMPTS[0], seed=3, height=32, width=32, num_frames=9, fps=16, crf=1)


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """The row, the folder of results, and what the command printed."""
    folder = tmp_path_factory.mktemp("results")
    config = BenchConfig(
        bundle=str(tiny_bundle), device="cpu", dtype="float32", pairs=2, serving=True, timeline="t.png"
    )
    printed = measure_row(config, folder, "codmd-serve bench --serving")
    return json.loads((folder / "serving-tiny-codmd-cpu.json").read_text()), folder, printed


def test_serving_row_writes_its_numbers_a_section_and_the_timeline(measured: tuple[dict[str, Any], Path, str]) -> None:
    row, folder, printed = measured
    assert sorted(file.name for file in folder.iterdir()) == ["performance.md", "serving-tiny-codmd-cpu.json", "t.png"]
    assert row["server"]["latency"]["count"] == 2 and row["server"]["saturation"]["count"] == 2
    assert row["server"]["own_ms"]["lowest"] > 0 and row["overlap"]["ratio"]["count"] == 2
    assert set(row["mlperf"]) == {"engine", "server"} and row["mlperf"]["server"]["num_offline"] == 16
    assert all(entry["single_stream_p90_ms"] > 0 for entry in row["mlperf"].values())
    text = (folder / "performance.md").read_text()
    assert "In MLPerf's form, server: SingleStream p90" in text
    assert "## tiny-codmd-cpu, served" in text and "![Timeline of three overlapped requests](t.png)" in text
    assert printed in text
    with Image.open(folder / "t.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}  # type: ignore[union-attr]
    assert {tuple(bytes.fromhex(name[1:])) for name in BAR_COLOURS[:3]} <= colours


def test_spans_of_the_timeline_are_whole_and_in_order(measured: tuple[dict[str, Any], Path, str]) -> None:
    requests = measured[0]["timeline"]["spans"]
    assert len(requests) == 3
    for spans in requests:
        assert {stage for stage, _, _ in spans} == set(LANES)
        assert all(start < end for _, start, end in spans)
        on_device = [(start, end) for stage, start, end in spans if stage in ("denoise", "decode")]
        assert on_device == sorted(on_device)
    ends = [max(end for stage, _, end in spans if stage == "encode") for spans in requests]
    assert ends == sorted(ends)
    assert measured[0]["timeline"]["encode_beside_ms"] == pytest.approx(1000 * overlap_s(requests))


def test_overhead_is_judged_by_the_median(measured: tuple[dict[str, Any], Path, str]) -> None:
    row = measured[0]
    row = {**row, "machine": {**row["machine"], "is_busy": False}}
    spread = row["server"]["latency"]
    for median, verdict in ((1.02, "2.0% (1.0 to 4.0, 2 pairs) | met"), (1.031, "3.1% (1.0 to 4.0, 2 pairs) | missed")):
        latency = {**spread, "q25": 1.01, "median": median, "q75": 1.04}
        text = "\n".join(serving_lines({**row, "server": {**row["server"], "latency": latency}}))
        assert f"| server over bare engine, one request | 3% | 1% | {verdict} |" in text
    without = "\n".join(serving_lines({**row, "server": None}))
    assert without.count("| not measured | |") == 2 and "through HTTP" not in without
    busy = serving_lines({**row, "machine": {**row["machine"], "is_busy": True}})
    assert "on a busy machine, to be made again: " in busy[2]
    assert document([], [row]).count("## ") == 1


def test_overlapped_requests_give_the_bytes_of_requests_in_a_row(tiny_bundle: Path, tmp_path: Path) -> None:
    engine = load_engine(tiny_bundle, "cpu")
    jobs = [replace(PARAMS, prompt=PROMPTS[number % 2], seed=number) for number in range(4)]
    folders = [tmp_path / "row", tmp_path / "overlapped"]
    for folder, run in zip(folders, (run_in_a_row, run_overlapped), strict=True):
        folder.mkdir()
        assert len(run(engine, jobs, folder)) == 4
    for number in range(4):
        row, overlapped = ((folder / f"{number}.mp4").read_bytes() for folder in folders)
        assert row == overlapped


def test_overlap_counts_encoding_beside_other_stages_of_later_requests_only(tmp_path: Path) -> None:
    first = [("denoise", 0.0, 2.0), ("decode", 2.0, 3.0), ("encode", 2.0, 5.0)]
    second = [("text", 1.0, 2.5), ("denoise", 3.0, 4.0), ("decode", 4.0, 6.0), ("encode", 4.5, 7.0)]
    assert overlap_s([first, second]) == pytest.approx(0.5 + 1.0 + 1.0)
    assert overlap_s([first]) == overlap_s([second, first[:1]]) == 0.0
    draw_timeline(tmp_path / "a.png", "two", [first, second])
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["timeline", "pictures/timeline.png", ""])
def test_a_timeline_has_to_be_the_name_of_a_picture(name: str) -> None:
    with pytest.raises(ConfigError, match=r"timeline must be the name of a \.png file, got"):
        BenchConfig(timeline=name)
