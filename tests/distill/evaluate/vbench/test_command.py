"""`codmd-distill eval vbench` from arguments to files and exit codes."""

import json
from pathlib import Path

import pytest
from PIL import Image
from vbench_cases import PLANNED, result_of

from distill.cli import main
from distill.evaluate.vbench.facts import DIMENSIONS
from distill.evaluate.vbench.results import write_result


def vbench(*arguments: object) -> int:
    return main(["eval", "vbench", *map(str, arguments)])


def whole_arm(folder: Path, value: float) -> Path:
    folder.mkdir()
    for name in DIMENSIONS:
        write_result(folder, result_of(name, [[value, value + 0.1], [value - 0.1, value]]))
    return folder


def test_commands_lead_from_a_plan_to_a_score(
    tmp_path: Path, suite_file: Path, tiny_bundle: Path, fake_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    given = ["--suite", suite_file, "--samples", 1, "--flicker-samples", 1, "--dimensions", *PLANNED]
    assert vbench("plan", "--out", folder, *given) == 0
    said = capsys.readouterr().out
    assert said.startswith("6 prompts, 6 videos, preset vbench, seed 0\n") and "not the prompt list of VBench" in said
    assert vbench("generate", folder, "--bundle", tiny_bundle, "--device", "cpu") == 0
    assert capsys.readouterr().out == "made 6, kept 0, failed 0\n"
    assert vbench("check", folder) == 0
    assert capsys.readouterr().out == "6 of 6 planned videos are good\n"
    assert vbench("run", folder, "--python", fake_python) == 0
    assert "| scene | 90.00" in capsys.readouterr().out
    assert vbench("score", folder) == 2
    error = capsys.readouterr().err
    assert "7 of 16 dimensions are missing: subject_consistency, motion_smoothness" in error
    assert vbench("score", folder, "--partial", "--out", tmp_path / "report") == 0
    assert "total |" not in capsys.readouterr().out.split("published")[0]
    rows = json.loads((tmp_path / "report" / "score.json").read_text())
    assert [row["name"] for row in rows] == PLANNED


def test_check_ends_with_1_and_the_list(tmp_path: Path, suite_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert vbench("plan", "--out", folder, "--suite", suite_file, "--dimensions", "scene", "--samples", 2) == 0
    (folder / "videos").mkdir()
    assert vbench("check", folder) == 1
    assert "2 missing: 0002-00.mp4, 0002-01.mp4" in capsys.readouterr().out


def test_score_prints_all_rows_totals_and_what_others_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vbench("score", whole_arm(tmp_path / "arm", 0.5)) == 0
    said = capsys.readouterr().out
    for name in (*DIMENSIONS, "quality", "semantic", "total"):
        assert f"| {name} |" in said
    for words in ("not ours", "83.02, 83.31, 83.69 and 84.26", "only pairs of one pipeline count", "VBench-2.0"):
        assert words in said
    assert vbench("score", tmp_path / "arm", "--preset", "mlperf") == 0
    said = capsys.readouterr().out
    assert "| mean | 50.00" in said and "70.48" in said and "total" not in said


def test_score_published_ends_with_0_and_names_the_misprint(capsys: pytest.CaptureFixture[str]) -> None:
    assert vbench("score", "--published") == 0
    said = capsys.readouterr().out
    assert "52 of 54 totals of 18 rows agree within .01; misprints 2; wrong 0" in said
    assert "| FlashVideo-8fps | semantic | 82.10 | 82.2" in said


def test_compare_writes_its_table_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = whole_arm(tmp_path / "new", 0.6), whole_arm(tmp_path / "old", 0.5)
    assert vbench("compare", first, second, "--out", tmp_path / "report") == 0
    said = capsys.readouterr().out
    assert "| scene | 60.00 | 50.00 | +10.00 [+10.00, +10.00] |" in said
    rows = json.loads((tmp_path / "report" / "compare.json").read_text())
    assert len(rows) == 19 and rows[-1]["name"] == "total"


def test_curve_writes_table_numbers_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [f"{step}={whole_arm(tmp_path / str(step), 0.3 + step / 10_000)}" for step in (2000, 1000)]
    assert vbench("curve", *points, "--out", tmp_path / "report") == 0
    said = capsys.readouterr().out
    assert said.startswith("| score | 1000 | 2000 |\n") and "| total | " in said
    data = json.loads((tmp_path / "report" / "curve.json").read_text())
    assert list(data) == ["1000", "2000"] and data["2000"][0]["value"] == pytest.approx(50.0)
    with Image.open(tmp_path / "report" / "curve.png") as plot:
        assert plot.width > 800


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--out", "x", "--preset", "vbench-2.0"], "LLaVA-Video-7B"),
        (["plan", "--out", "x", "--suite", "nowhere.json"], "pip download"),
        (["plan", "--out", "x", "--seed", "-1"], "--seed"),
        (["generate", "nowhere"], "no plan.json"),
        (["generate", "nowhere", "--shard", "one"], "--shard"),
        (["check", "nowhere"], "no plan.json"),
        (["run", "nowhere"], "no plan.json"),
        (["score"], "nothing to score"),
        (["score", "nowhere.json"], "cannot be read"),
        (["compare", "nowhere.json", "nowhere.json"], "cannot be read"),
        (["curve", "1000"], "ITERATION=FOLDER"),
        (["curve", "1000=nowhere.json"], "cannot be read"),
        (["sing"], "invalid choice"),
    ],
)
def test_vbench_refuses_bad_input_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert vbench(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("codmd-distill: ") and message in error and error.count("\n") == 1


def test_curve_refuses_points_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = whole_arm(tmp_path / "a", 0.5), whole_arm(tmp_path / "b", 0.5)
    assert vbench("curve", f"1={first}") == 2 and "two points" in capsys.readouterr().err
    assert vbench("curve", f"1={first}", f"01={second}") == 2 and "given twice" in capsys.readouterr().err
    (second / "color.json").unlink()
    assert vbench("curve", f"1={first}", f"2={second}") == 2 and "iteration 2 lacks color" in capsys.readouterr().err
