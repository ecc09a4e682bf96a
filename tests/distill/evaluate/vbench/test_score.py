"""The aggregator: VBench's arithmetic, published rows, and everything that is no score."""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vbench_cases import result_of

from codmd_serve.errors import ConfigError
from distill.evaluate.vbench.facts import DIMENSIONS, MISPRINTS, PRESETS, QUALITY, SEMANTIC
from distill.evaluate.vbench.results import DimensionResult, write_result
from distill.evaluate.vbench.score import agreement, read_scores, summary, totals

FLICKER = "temporal_flickering"


def all_results(value: float = 0.5) -> dict[str, DimensionResult]:
    return {name: result_of(name, [[value, value], [value]]) for name in DIMENSIONS}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({name: dimension.high for name, dimension in DIMENSIONS.items()}, (100.0, 100.0, 100.0)),
        ({name: dimension.low for name, dimension in DIMENSIONS.items()}, (0.0, 0.0, 0.0)),
        (dict.fromkeys(DIMENSIONS, 1.0), (100.132, 169.126, 113.931)),
        (dict.fromkeys(DIMENSIONS, 0.0), (-71.460, -0.035, -57.175)),
    ],
)
def test_totals_of_the_extremes(raw: dict[str, float], expected: tuple[float, float, float]) -> None:
    assert tuple(totals(raw).values()) == pytest.approx(expected, abs=6e-4)


def test_weights_are_those_of_vbench() -> None:
    weights = {
        group: sum(dimension.weight for dimension in DIMENSIONS.values() if dimension.group == group)
        for group in (QUALITY, SEMANTIC)
    }
    assert weights == {QUALITY: 6.5, SEMANTIC: 9.0}


def test_totals_agree_with_every_published_row_but_the_known_misprint() -> None:
    found = agreement()
    assert len({row.model for row in found}) == 18 and len(found) == 54
    differing = {(row.model, row.name) for row in found if not row.agrees}
    assert differing == set(MISPRINTS) == {("FlashVideo-8fps", "semantic"), ("FlashVideo-8fps", "total")}
    semantic, total = (row for row in found if not row.agrees)
    assert (semantic.published, round(semantic.ours, 2)) == (82.10, 82.20)
    # The published total was made of the misprint.
    quality = next(row for row in found if row.model == "FlashVideo-8fps" and row.name == "quality")
    assert total.published == pytest.approx((4 * quality.published + semantic.published) / 5, abs=0.01)


def test_agreement_sees_a_wrong_row(tmp_path: Path) -> None:
    head = ",".join(["model", *DIMENSIONS, "quality", "semantic", "total"])
    path = tmp_path / "rows.csv"
    path.write_text(f"{head}\nmine,{','.join(['100'] * 16)},100.13,169.13,114.93\n")
    assert [row.agrees for row in agreement(path)] == [True, True, False]
    path.write_text(f"{head}\nmine,{','.join(['100'] * 15)},high,1,1,1\n")
    with pytest.raises(ConfigError, match="line 2: ValueError"):
        agreement(path)


def test_missing_dimensions_are_refused_with_the_list_and_never_filled() -> None:
    results = all_results()
    del results["color"], results[FLICKER]
    with pytest.raises(ConfigError, match=r"2 of 16 dimensions are missing: temporal_flickering, color"):
        summary(results, PRESETS["vbench"], is_partial=False)
    with pytest.raises(ConfigError, match="temporal_flickering, color"):
        totals({name: result.raw for name, result in results.items()})
    names = [row.name for row in summary(results, PRESETS["vbench"], is_partial=True)]
    assert len(names) == 14 and not {"quality", "semantic", "total"} & set(names)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.5, 96.4])
def test_totals_refuse_what_is_no_score(value: float) -> None:
    with pytest.raises(ConfigError, match="scene"):
        totals({**dict.fromkeys(DIMENSIONS, 0.5), "scene": value})


def test_mlperf_is_the_plain_mean_of_six_raw_scores() -> None:
    names = PRESETS["mlperf"].dimensions
    results = {name: result_of(name, [[0.1 * place], [0.1 * place]]) for place, name in enumerate(names)}
    rows = {row.name: row.value for row in summary(results, PRESETS["mlperf"], is_partial=False)}
    assert rows["mean"] == pytest.approx(25.0) and "total" not in rows


def test_failed_videos_stay_in_the_denominator_and_protocol_skips_do_not() -> None:
    assert result_of("scene", [[0.8, None], [0.8, 0.8]]).raw == pytest.approx(0.6)
    skipped = result_of("color", [[0.8, None], [0.8, 0.8]], reason="not counted: no object")
    assert skipped.raw == pytest.approx(0.8) and skipped.num_videos == 3


def test_intervals_resample_prompts_and_not_videos() -> None:
    # Ten copies of a video of each prompt are no more evidence than one.
    rng = np.random.default_rng(0)
    values = rng.random(40)
    once = {"scene": result_of("scene", [[float(value)] for value in values])}
    often = {"scene": result_of("scene", [[float(value)] * 10 for value in values])}
    rows = [summary(results, PRESETS["vbench"], is_partial=True)[0] for results in (once, often)]
    assert rows[0].low == pytest.approx(rows[1].low) and rows[0].high == pytest.approx(rows[1].high)
    half_width = 1.96 * 100 * values.std() / math.sqrt(40)
    assert (rows[0].high - rows[0].low) / 2 == pytest.approx(half_width, rel=0.15)
    assert rows[0].low < rows[0].value < rows[0].high


def vbench_file(path: Path, scores: dict[str, list[float]], mean: float | None = None) -> Path:
    data = {
        name: [
            sum(values) / len(values) if mean is None else mean,
            [
                {"video_path": f"videos/a prompt {row // 5}-{row % 5}.mp4", "video_results": value}
                for row, value in enumerate(values)
            ],
        ]
        for name, values in scores.items()
    }
    path.write_text(json.dumps(data))
    return path


def test_scores_are_read_from_vbench_files_and_zips_and_folders(tmp_path: Path) -> None:
    file = vbench_file(tmp_path / "one_eval_results.json", {FLICKER: [0.9] * 375})
    archive = tmp_path / "results.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        writer.write(file, "inner/one_eval_results.json")
        writer.writestr("inner/._one_eval_results.json", b"metadata of a Mac")
        writer.writestr("inner/one_full_info.json", "[]")
    for source in (file, archive, tmp_path):
        (result,) = read_scores([source]).values()
        assert result.raw == pytest.approx(0.9) and result.num_videos == 375
    assert "is not known" in result.notes[0]


def test_scores_with_spaces_in_their_names_are_those_of_the_leaderboard(tmp_path: Path) -> None:
    path = tmp_path / "a_eval_results.json"
    path.write_text(json.dumps({"human action": [0.9]}))
    (result,) = read_scores([path]).values()
    assert result.dimension == "human_action" and "not known" in result.notes[0]


def test_too_few_videos_are_refused_or_counted_as_zero(tmp_path: Path) -> None:
    path = vbench_file(tmp_path / "a_eval_results.json", {FLICKER: [0.9] * 300})
    with pytest.raises(ConfigError, match="300 videos, VBench's suite has 375"):
        read_scores([path])
    (result,) = read_scores([path], failed_as_zero=True).values()
    assert result.raw == pytest.approx(0.9 * 300 / 375) and result.num_failed == 75
    (colour,) = read_scores([vbench_file(tmp_path / "c_eval_results.json", {"color": [0.9] * 300})]).values()
    assert colour.raw == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "one object of dimensions"),
        ('{"taste": [0.5]}', "no dimension of VBench"),
        ('{"scene": 0.5}', "a list of the score and the videos"),
        ('{"scene": [NaN]}', "scene is nan"),
        ('{"scene": [61.5]}', "in 0..1"),
        ('{"scene": ["0.5"]}', "a number in 0..1"),
        ('{"scene": [0.5, [{"video_path": "a-0.mp4", "video_results": NaN}]]}', "is nan"),
        ('{"scene": [0.5, [{"video_results": 0.5}]]}', "needs video_path and video_results"),
        ('{"scene": [0.5], "scene": [0.6]}', "twice"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_files_that_hold_no_scores_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a_eval_results.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_scores([path])


def test_a_dimension_with_two_values_and_names_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    one = vbench_file(tmp_path / "a_eval_results.json", {FLICKER: [0.9] * 375})
    two = vbench_file(tmp_path / "A_eval_results.json", {FLICKER: [0.8] * 375})
    with pytest.raises(ConfigError, match=r"is 0.9\d* in .* and 0.8\d* in"):
        read_scores([one, two])
    with pytest.raises(ConfigError, match=r"differ only in case.*'A_eval_results.json' and 'a_eval_results.json'"):
        read_scores([tmp_path])
    archive = tmp_path / "results.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        writer.write(one, "a_eval_results.json")
        writer.write(two, "A_eval_results.json")
    with pytest.raises(ConfigError, match="differ only in case"):
        read_scores([archive])


def test_results_of_two_plans_and_of_two_cases_are_refused(tmp_path: Path) -> None:
    write_result(tmp_path, result_of("scene", [[0.5]], plan="one"))
    write_result(tmp_path, result_of("color", [[0.5]], plan="two"))
    with pytest.raises(ConfigError, match="results of 2 plans"):
        read_scores([tmp_path])
    write_result(tmp_path, result_of("color", [[0.5]], plan="one"))
    assert set(read_scores([tmp_path])) == {"scene", "color"}
    (tmp_path / "Scene.json").write_bytes((tmp_path / "scene.json").read_bytes())
    with pytest.raises(ConfigError, match="differ only in case"):
        read_scores([tmp_path])


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    write_result(tmp_path, result_of("scene", [[0.5]]))
    path = tmp_path / "scene.json"
    data: dict[str, Any] = json.loads(path.read_text())
    for change, message in (
        ({"format": "other"}, "is no result"),
        ({"raw": math.nan}, "raw is nan"),
        ({"videos": [{**data["videos"][0], "score": math.nan}]}, "is nan"),
        ({"videos": [{"prompt": "a"}]}, "is damaged"),
        ({"videos": data["videos"] * 2}, "does not belong to the 2 videos"),
        ({"videos": []}, "does not belong to the 0 videos"),
        ({"raw": 0.6}, "does not belong"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ConfigError, match=message):
            read_scores([tmp_path])
