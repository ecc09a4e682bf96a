"""Driving the evaluator, with a package `vbench` of ours in an environment of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from codmd_serve.errors import CodmdError, ConfigError
from distill.evaluate.vbench.generate import LEDGER_NAME, VIDEOS_NAME
from distill.evaluate.vbench.manifest import Plan
from distill.evaluate.vbench.results import RESULTS_NAME, read_results
from distill.evaluate.vbench.run import UNFILTERED, RunSettings, check_environment, run

FLICKER = "temporal_flickering"
Filled = Callable[..., tuple[Path, Plan]]


def test_run_scores_every_dimension_and_keeps_what_is_scored(
    filled: Filled, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = filled()
    results = run(folder, RunSettings(python=fake_python))
    assert list(results) == plan.dimensions and results == read_results(folder)
    for name, result in results.items():
        assert result.raw == pytest.approx(0.5 if name == "human_action" else 0.7), name
        assert result.num_videos == len(result.videos) == 2 * len(plan.scored_on(name))
        assert all(0 <= (video.score or 0) <= 1 for video in result.videos)
        assert result.evaluator["vbench"] == "0.1.5" and result.evaluator["device"] == "cpu"
    assert results[FLICKER].notes[0] == UNFILTERED
    assert "2 videos of a prompt or more, where VBench scores 5" in results["scene"].notes
    monkeypatch.setenv("VBENCH_FAULT", "crash")
    assert run(folder, RunSettings(python=fake_python)) == results
    (folder / RESULTS_NAME / "scene.json").unlink()
    with pytest.raises(
        CodmdError, match=r"scene: the evaluator failed: RuntimeError: no such weights \(see .*scene\.log"
    ):
        run(folder, RunSettings(python=fake_python))


@pytest.mark.parametrize("fault", ["failed", "damaged", "dropped"])
def test_run_keeps_failed_videos_in_the_denominator(
    fault: str, filled: Filled, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = filled("scene")
    video = folder / VIDEOS_NAME / "0002-00.mp4"
    if fault == "failed":
        video.unlink()
        (folder / LEDGER_NAME).write_text(
            json.dumps({"file": video.name, "status": "failed", "message": "no memory"}) + "\n"
        )
    elif fault == "damaged":
        video.write_bytes(b"no video")
    else:
        monkeypatch.setenv("VBENCH_FAULT", "drop")
    if fault != "dropped":
        with pytest.raises(ConfigError, match=r"1 of 2 planned videos are good; 1 (failed|damaged): 0002-00\.mp4"):
            run(folder, RunSettings(python=fake_python))
    result = run(folder, RunSettings(python=fake_python, failed_as_zero=True))["scene"]
    # The video that is left scored .5.
    assert (result.evaluator_raw, result.raw) == (0.5, 0.25)
    assert (result.num_videos, result.num_failed) == (2, 1)
    assert result.videos[0].score is None and result.videos[0].reason
    assert "1 of 2 videos failed and count as 0" in result.notes


def test_run_leaves_out_what_vbench_leaves_out_by_protocol(
    filled: Filled, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VBENCH_FAULT", "skip")
    folder, _ = filled("color")
    result = run(folder, RunSettings(python=fake_python))["color"]
    assert (result.raw, result.num_videos, result.num_failed) == (0.5, 1, 0)
    assert result.videos[0].reason.startswith("not counted: ")


def test_run_refuses_missing_videos_even_when_failures_count_as_zero(filled: Filled, fake_python: Path) -> None:
    folder, _ = filled("scene")
    (folder / VIDEOS_NAME / "0002-01.mp4").unlink()
    with pytest.raises(ConfigError, match=r"1 missing: 0002-01\.mp4"):
        run(folder, RunSettings(python=fake_python, failed_as_zero=True))


def test_run_refuses_a_score_that_is_none(filled: Filled, fake_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBENCH_FAULT", "nan")
    folder, _ = filled("scene")
    with pytest.raises(CodmdError, match="scene is nan"):
        run(folder, RunSettings(python=fake_python))
    assert not (folder / RESULTS_NAME / "scene.json").exists()


def test_run_takes_the_static_videos_of_a_filter(filled: Filled, fake_python: Path, tmp_path: Path) -> None:
    folder, _ = filled(FLICKER, samples=7)
    chosen = {
        f"{row:04d}": {"static_count": 6, "static_path": [f"/a/{row:04d}-{s:02d}.mp4" for s in range(1, 7)]}
        for row in (0, 1)
    }
    path = tmp_path / "filtered_static_video.json"
    path.write_text(json.dumps(chosen))
    result = run(folder, RunSettings(python=fake_python, static_filter=path))[FLICKER]
    assert [video.sample for video in result.videos] == [1, 2, 3, 4, 5] * 2
    assert UNFILTERED not in result.notes and result.raw == pytest.approx(0.5)
    path.write_text(json.dumps({"0000": chosen["0000"]}))
    with pytest.raises(ConfigError, match="no static video of 1 prompts: 0001"):
        run(folder, RunSettings(python=fake_python, static_filter=path))
    path.write_text(json.dumps({"0000": {"static_path": ["other-0.mp4"]}}))
    with pytest.raises(ConfigError, match=r"not of this plan: other-0\.mp4"):
        run(folder, RunSettings(python=fake_python, static_filter=path))


def test_run_refuses_dimensions_that_were_not_planned(filled: Filled, fake_python: Path) -> None:
    folder, _ = filled("scene")
    with pytest.raises(ConfigError, match="the plan has no color; it has scene"):
        run(folder, RunSettings(python=fake_python, dimensions=("color",)))


def test_environment_is_refused_with_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make vbench-env"):
        check_environment(tmp_path / "python")
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho 'PackageNotFoundError: No package metadata was found for vbench' >&2\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(ConfigError, match="has no vbench: PackageNotFoundError"):
        check_environment(bare)
