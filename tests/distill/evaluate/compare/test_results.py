"""Results that are not whole are refused with the list; intervals and p-values are scipy's; the report of them."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny_comparison import TINY

from codmd_serve.errors import ConfigError
from distill.cli import main
from distill.evaluate.compare.report import as_markdown, summary
from distill.evaluate.compare.results import check_complete, differences, paired
from distill.evaluate.compare.table import as_dict, parse_table


@pytest.fixture
def data() -> dict[str, Any]:
    """Five seeds in which codmd is worse in w1 and equal in the rest, and the start is better in tau_err."""
    table = parse_table({**TINY, "seeds": [1, 2, 3, 4, 5]})
    rng, cells = np.random.default_rng(0), []
    for seed in table.seeds:
        common = rng.normal(0, 0.02, 2)
        for arm in table.arms:
            for budget in table.budgets:
                own = rng.normal(0, 0.001, 2)
                tau = 0.2 + common[0] + own[0] - (0.1 if arm.name == "dmd+start" else 0.0)
                w1 = 0.3 + common[1] + own[1] + (0.05 if arm.name == "codmd" else 0.0)
                score = {"tau_err": tau, "w1": w1, "kept": 1.1, "tau_kept": 0.9, "sd_ratio": 0.9, "copying": 0.5}
                cells.append(
                    {
                        "arm": arm.name,
                        "guidance": 1.0,
                        "budget": budget,
                        "seed": seed,
                        "student_updates": budget,
                        "calls": {"student": 1, "critic": 2, "teacher": 3},
                        "cpu_s": 1.0,
                        "steps": [score] * 4,
                    }
                )
    return {"format": 1, "table": as_dict(table), "cells": cells}


def cell(data: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    return next(entry for entry in data["cells"] if entry["arm"] == arm and entry["seed"] == seed)


def test_what_is_missing_or_no_number_is_listed_and_never_filled_in(data: dict[str, Any]) -> None:
    check_complete(data)
    broken = copy.deepcopy(data)
    broken["cells"].remove(cell(broken, "codmd", 3))
    cell(broken, "dmd", 1)["steps"] = [{**cell(data, "dmd", 1)["steps"][0], "w1": math.nan}]
    del cell(broken, "truth", 2)["steps"][0]["tau_err"]
    cell(broken, "codmd", 4)["calls"] = {"student": 1, "critic": 2, "teacher": 4}
    cell(broken, "codmd", 5)["student_updates"] = 1
    with pytest.raises(ConfigError) as caught:
        check_complete(broken)
    message = str(caught.value)
    for part in (
        "no scores of codmd g=1 budget=2 seed=3",
        "dmd g=1 budget=2 seed=1: w1 is nan after step 1",
        "truth g=1 budget=2 seed=2: tau_err is missing after step 1",
        "codmd g=1 budget=2 seed=4: teacher calls 4, dmd has 3",
        "codmd g=1 budget=2 seed=5: student_updates 1, dmd has 2",
    ):
        assert part in message
    # The started arm says why, so its calls may differ.
    cell(data, "dmd+start", 1)["calls"] = {"student": 1, "critic": 2, "teacher": 4}
    check_complete(data)


def test_paired_intervals_are_those_of_the_t_test() -> None:
    first, second = [0.31, 0.28, 0.35, 0.30, 0.33], [0.30, 0.29, 0.30, 0.28, 0.30]
    test = stats.ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    mean, own_low, own_high, p = paired(first, second)
    assert (mean, own_low, own_high, p) == pytest.approx((np.subtract(first, second).mean(), low, high, test.pvalue))
    assert paired([1.0, 1.0], [1.0, 1.0]) == (0.0, 0.0, 0.0, 1.0)


def test_differences_are_adjusted_over_the_metrics(data: dict[str, Any]) -> None:
    found = differences(data, "codmd", "dmd", 1.0, 3)
    assert found["w1"].p_holm < 0.001 and found["w1"].low < 0.05 < found["w1"].high
    assert found["tau_err"].p_holm >= found["tau_err"].p > 0.05


def test_the_summary_names_gains_losses_and_null_results(data: dict[str, Any]) -> None:
    text = summary(data)
    assert "better: dmd+start (tau_err);" in text and "worse: codmd (w1);" in text
    assert "dmd overstates the strong rank correlations: 1.100" in text
    assert "dmd loses the dependence of the tied factors: 0.900" in text
    for entry in data["cells"]:
        if entry["arm"] == "codmd":
            entry["steps"] = cell(data, "dmd", entry["seed"])["steps"]
    assert "no difference was found for: codmd;" in summary(data)


def test_the_report_is_made_of_the_json_alone(
    data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "tiny.json", tmp_path / "evidence.md"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert main(["eval", "compare", "report", str(path), "--out", str(out)]) == 0
    text, page = out.read_text(encoding="utf-8"), out.with_suffix(".html").read_text(encoding="utf-8")
    assert text == as_markdown([data], [line.strip() for line in text.split("## Made by")[1].strip().splitlines()])
    for part in ("| dmd+start - dmd |", "What this does not show", "84.46", "83.02, 83.31, 83.69 and 84.26", "0.050"):
        assert part in text, part
    assert page.count("<svg") == 3 and "<table>" in page and "http" not in page.split("<svg")[0]
    # Two that differ only in case are one file on some machines.
    other = tmp_path / "TINY.json"
    other.write_text(json.dumps(data), encoding="utf-8")
    assert main(["eval", "compare", "report", str(path), str(other), "--out", str(out)]) == 2
    assert "differ in more than case" in capsys.readouterr().err
    path.write_text(json.dumps({**data, "cells": data["cells"][1:]}), encoding="utf-8")
    assert main(["eval", "compare", "report", str(path), "--out", str(out)]) == 2
