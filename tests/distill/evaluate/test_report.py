"""Numbers, tables and verdicts from arms whose quality is known by construction."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from distill.evaluate.report import METRICS, Analysis, analysis_json, comparisons, headroom, targets
from distill.evaluate.sample import render_truth
from distill.evaluate.shapebench import Reference, Suite, SuiteConfig, measure_arm, measure_reference, plan_suite
from distill.evaluate.tables import as_markdown

CONFIG = SuiteConfig(num_captions=8, num_seeds=1, depth_captions=2, depth_seeds=6)


def ignore(num_clips: int) -> None:
    pass


@pytest.fixture(scope="module")
def suite() -> Suite:
    return plan_suite(CONFIG)


@pytest.fixture(scope="module")
def analysis(suite: Suite) -> Analysis:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.evaluate.shapebench._MIN_REFERENCE", 24)
        reference = measure_reference(suite, CONFIG, ignore)
    return Analysis(build_arms(suite, reference), suite, reference, seed=0)


def build_arms(suite: Suite, reference: Reference) -> list:
    """Renders as teacher, other renders as its second sample, blurred and frozen ones as few steps and student."""
    truth, again = render_truth(suite.requests, 0), render_truth(suite.requests, 0, 2)
    blurred = np.rint(ndimage.gaussian_filter(truth.astype(float), (0, 0, 1.5, 1.5, 0))).astype(np.uint8)
    frozen = np.repeat(truth[:, :1], truth.shape[1], axis=1)
    arms = {"teacher": truth, "teacher_again": again, "few": blurred, "frozen": frozen}
    return [
        measure_arm(name, f"row {name}", clips, suite, reference, ignore, keep_samples=(0,))
        for name, clips in arms.items()
    ]


def test_plan_suite_is_held_out_moving_in_depth_and_reproducible(suite: Suite) -> None:
    assert plan_suite(CONFIG).requests == suite.requests
    assert suite.is_breadth.sum() == 8
    assert len(set(suite.caption_index[suite.is_breadth])) == 8
    assert len(set(suite.requests)) == len(suite.requests)
    for index in suite.depth:
        rows = suite.rows(index)
        assert [suite.requests[row].seed for row in rows] == list(range(6))
        assert "still" not in suite.requests[rows[0]].caption
    assert sorted(suite.num_objects[suite.rows(index)[0]] for index in suite.depth) == [1, 2]


def test_analysis_values_and_differences_have_the_known_sign(analysis: Analysis) -> None:
    metrics = {metric.key: metric for metric in METRICS}
    assert analysis.value(metrics["all"], "teacher").mean == 1.0
    assert analysis.value(metrics["one_all"], "teacher").num_clusters == 4
    assert analysis.value(metrics["dynamic"], "frozen").mean == 0.0
    blur = analysis.difference(metrics["imaging"], "few", "teacher")
    assert blur.high < -0.05
    assert analysis.difference(metrics["direction"], "frozen", "teacher").mean < 0.0
    assert abs(analysis.difference(metrics["all"], "teacher_again", "teacher").mean) < 0.2
    same = analysis.difference(metrics["dependence"], "teacher", "teacher")
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    assert analysis.value(metrics["diversity"], "teacher").mean == pytest.approx(1.0, abs=0.25)


def test_comparisons_pair_only_arms_that_are_there(analysis: Analysis) -> None:
    pairs = comparisons(analysis, ["frozen"])
    assert pairs == [("teacher_again", "teacher"), ("few", "teacher"), ("frozen", "teacher"), ("frozen", "few")]


def test_headroom_counts_in_units_of_the_second_sample(analysis: Analysis) -> None:
    rows = {row["metric"]: row for row in headroom(analysis) if row["arm"] == "few"}
    assert rows["imaging"]["units"] > 5 and rows["imaging"]["enough"]
    assert not rows["marginal"]["enough"]


def test_targets_name_what_a_frozen_student_fails(analysis: Analysis) -> None:
    judged = targets(analysis, "frozen")
    assert "direction" in judged["below_wanted_share"]
    assert judged["share_of_teacher"]["colour"] == 1.0
    assert "imaging" not in judged["worse_than_few"]
    assert {"one_form", "two_form_worst", "two_form_whole"} <= {metric.key for metric in METRICS}
    assert "bend_modes" in judged["worse_than_few"]


def test_report_shows_every_arm_and_is_valid_json(analysis: Analysis) -> None:
    settings: dict[str, object] = {"seed": 0, "teacher": "weights/shapeworld"}
    text = as_markdown(analysis, ["frozen"], settings)
    assert all(text.count(f"| row {name} |") == 5 for name in analysis.arms)
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    data = analysis_json(analysis, ["frozen"], settings)
    again = json.loads(json.dumps(data, allow_nan=False))
    assert set(again["arms"]) == {"teacher", "teacher_again", "few", "frozen"}
    assert set(again["arms"]["few"]["scores"]) == {metric.key for metric in METRICS}
    assert as_markdown(analysis, ["frozen"], settings) == text


def test_report_without_depth_leaves_the_joint_table_out() -> None:
    config = SuiteConfig(num_captions=4, depth_captions=0)
    suite = plan_suite(config)
    reference = measure_reference(suite, config, ignore)
    arm = measure_arm("truth", "ground truth", render_truth(suite.requests, 0), suite, reference, ignore)
    analysis = Analysis([arm], suite, reference, 0)
    text = as_markdown(analysis, [], {})
    assert "Caption following" in text and "Kendall" not in text and "Headroom" not in text
    json.dumps(analysis_json(analysis, [], {}), allow_nan=False)


def test_headroom_without_a_unit_is_a_dash_and_not_a_large_number(suite: Suite, analysis: Analysis) -> None:
    """The teacher's second sample scores exactly as its first: nothing can be counted in their difference."""
    arms = [
        arm if name != "teacher_again" else replace(analysis.arms["teacher"], name=name)
        for name, arm in analysis.arms.items()
    ]
    alike = Analysis(arms, suite, analysis.reference, seed=0)
    rows = headroom(alike)
    assert rows and all(row["units"] is None and not row["enough"] for row in rows)
    text = as_markdown(alike, [], {})
    assert "few: imaging" in text and "000000" not in text
    json.dumps(analysis_json(alike, [], {}), allow_nan=False)
