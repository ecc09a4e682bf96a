"""Results that are not whole are refused with the list; intervals, p-values and shares are those of the textbook."""

import copy
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic_comparison import RULED, comparison
from tiny_comparison import TINY

from codmd_serve.errors import ConfigError
from distill.evaluate.compare.results import Comparison, check_complete, interval, paired, read_results, share_closed

FIVE = {**TINY, "seeds": [1, 2, 3, 4, 5], "curve": [1]}


def error(arm: str, updates: int, metric: str) -> float:
    """Codmd is worse than dmd in w1 and equal in the rest, the start is better in tau_err."""
    del updates
    value = {"tau_err": 0.2, "w1": 0.3}[metric]
    if arm == "truth":
        return 0.01
    if (arm, metric) in (("codmd", "w1"), ("dmd+start", "tau_err")):
        return value + (0.05 if metric == "w1" else -0.1)
    return value


@pytest.fixture
def data() -> dict[str, Any]:
    return comparison(FIVE, error, spread=0.005, has_matrices=True)


def cell(data: dict[str, Any], arm: str, seed: int, budget: int = 2) -> dict[str, Any]:
    return next(
        entry for entry in data["cells"] if (entry["arm"], entry["seed"], entry["budget"]) == (arm, seed, budget)
    )


def test_what_is_missing_or_no_number_is_listed_and_never_filled_in(data: dict[str, Any]) -> None:
    check_complete(data)
    broken = copy.deepcopy(data)
    broken["cells"].remove(cell(broken, "codmd", 3))
    broken["cells"].remove(cell(broken, "codmd", 3, budget=1))
    cell(broken, "dmd", 1)["steps"] = [{**cell(data, "dmd", 1)["steps"][0], "w1": math.nan}] * 4
    cell(broken, "dmd", 2, budget=1)["steps"] = [{**cell(data, "dmd", 1)["steps"][0], "tau_err": math.inf}]
    cell(broken, "dmd", 3)["steps"] = [{**cell(data, "dmd", 1)["steps"][0], "kept": math.nan}] * 4
    cell(broken, "dmd", 4)["steps"] = cell(data, "dmd", 4)["steps"][:3]
    cell(broken, "truth", 2)["steps"] = [{"w1": True}]
    cell(broken, "codmd", 4)["calls"] = {"student": 1, "critic": 160, "teacher": 4}
    cell(broken, "codmd", 4, budget=1)["calls"] = {"student": 1, "critic": 3, "teacher": 20}
    cell(broken, "codmd", 5)["student_updates"] = 1
    cell(broken, "dmd", 5)["matrices"] = {"tau": [[1.0, math.nan], [0.5, 1.0]], "rho": [[1.0, 0.5]]}
    with pytest.raises(ConfigError) as caught:
        check_complete(broken)
    message = str(caught.value)
    for part in (
        "no scores of codmd g=1 budget=2 seed=3",
        "no scores of codmd g=1 budget=1 seed=3",
        "dmd g=1 budget=2 seed=1: w1 is nan after step 1",
        "dmd g=1 budget=1 seed=2: tau_err is inf after step 1",
        "dmd g=1 budget=2 seed=3: kept is nan after step 1",
        "dmd g=1 budget=2 seed=4: 3 steps, its first seed has 4",
        "truth g=1 budget=2 seed=2: tau_err is missing after step 1",
        "truth g=1 budget=2 seed=2: w1 is True after step 1",
        "codmd g=1 budget=2 seed=4: teacher calls 4, dmd has 40",
        "codmd g=1 budget=1 seed=4: critic calls 3, dmd has 80",
        "codmd g=1 budget=2 seed=5: student_updates 1, dmd has 2",
        "dmd g=1 budget=2 seed=5: matrix tau holds what is no number",
        "dmd g=1 budget=2 seed=5: matrix rho is not square",
    ):
        assert part in message.replace("\n  and", "\n  "), message
    # The started arm says why, so its calls may differ.
    cell(data, "dmd+start", 1)["calls"] = {"student": 1, "critic": 2, "teacher": 4}
    check_complete(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["table"].pop("metrics"), "the table has no metrics"),
        (lambda data: data["table"].update(baseline="moon"), "the baseline moon is no arm"),
        (lambda data: data["cells"][0].pop("calls"), "cell 0 has no calls"),
        (lambda data: data["cells"][1]["calls"].pop("critic"), "cell 1 has no calls of critic"),
        (lambda data: data["cells"].append(data["cells"][0]), "a cell is there twice"),
        (lambda data: data.update(format=2), "no results of eval compare of format 1"),
    ],
)
def test_what_is_no_comparison_is_refused(data: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    data["cells"][1]["calls"] = dict(data["cells"][1]["calls"])
    change(data)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_results(path)


def test_a_packed_file_is_read_and_a_damaged_one_refused(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    assert read_results(path).table["name"] == "tiny"
    for damaged in (path.read_bytes()[:-9], b"{}", gzip.compress(b"[]"), gzip.compress(b"\xff\xfe\xfa")):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"x\.json\.gz"):
            read_results(path)


def test_paired_intervals_are_those_of_the_t_test() -> None:
    first, second = [0.31, 0.28, 0.35, 0.30, 0.33], [0.30, 0.29, 0.30, 0.28, 0.30]
    test = stats.ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    mean, own_low, own_high, p = paired(first, second)
    assert (mean, own_low, own_high, p) == pytest.approx((np.subtract(first, second).mean(), low, high, test.pvalue))
    assert paired([1.0, 1.0], [1.0, 1.0]) == (0.0, 0.0, 0.0, 1.0)
    found = interval(first)
    assert (found.low, found.high) == pytest.approx(stats.ttest_1samp(first, 0.0).confidence_interval(0.95))


def test_the_share_of_the_gap_has_fiellers_interval() -> None:
    rng = np.random.default_rng(1)
    baseline, arm, floor = 0.2 + rng.normal(0, 0.01, 5), 0.1 + rng.normal(0, 0.01, 5), 0.01 + rng.normal(0, 0.001, 5)
    share = share_closed(arm, baseline, floor)
    assert share is not None and share.mean == pytest.approx((baseline - arm).mean() / (baseline - floor).mean())
    # Its ends are the ratios r for which the mean of moved - r * gap is just not told from 0.
    for end in (share.low, share.high):
        assert stats.ttest_1samp((baseline - arm) - end * (baseline - floor), 0.0).pvalue == pytest.approx(0.05)
    assert share_closed(arm, floor, baseline) is None, "the baseline is below the floor"
    assert share_closed(arm, floor + rng.normal(0, 0.01, 5), floor) is None, "no gap that seeds can tell from 0"


def test_differences_are_adjusted_over_the_metrics(data: dict[str, Any]) -> None:
    setting = Comparison(data).settings[-1]
    assert setting.budget == 3 and setting.name == "tiny, 3 updates"
    found = setting.differences("codmd", "dmd")
    assert found["w1"].verdict == 1 and found["w1"].low < 0.05 < found["w1"].high
    assert found["tau_err"].p_holm >= found["tau_err"].p > 0.05 and found["tau_err"].verdict == 0
    assert setting.differences("dmd+start", "dmd")["tau_err"].verdict == -1


def test_cpu_seconds_are_of_all_parts_of_a_run_and_once_of_an_arm_that_no_budget_changes() -> None:
    table = {**RULED, "curve": [1]}
    made = comparison(table, lambda arm, updates, metric: 0.2)
    for cell in made["cells"]:
        cell["cpu_s"] = {"dmd": 10.0 * cell["budget"], "alone": 7.0 if cell["budget"] == 2 else 0.0}.get(cell["arm"], 1)
    small, large = Comparison(made).settings
    assert (small.budget, large.budget) == (2, 3)
    assert small.cpu_s("dmd") == 10 + 20 and large.cpu_s("dmd") == 10 + 20 + 30
    assert small.cpu_s("alone") == large.cpu_s("alone") == 7
