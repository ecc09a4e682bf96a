"""The scores of all cells as one JSON object, and the statistics over seeds: paired t-intervals, Holm over metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from codmd_serve.errors import ConfigError
from codmd_serve.textfiles import read_json_object
from distill.evaluate.stats import holm

FORMAT = 1
MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference over seeds.

    Attributes:
        mean: of arm minus baseline.
        low, high: of the 95% t-interval.
        p: of the two-sided t-test.
        p_holm: adjusted for the number of metrics.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float


def check_complete(data: Mapping[str, Any]) -> None:
    """Refuse results that lack a cell, a metric or a number, or whose runs cost more or less than they declare.

    Raises:
        ConfigError: lists what is wrong; nothing is ever filled in.
    """
    table, problems = data["table"], list[str]()
    cells = {_key(cell): cell for cell in data["cells"]}
    if len(cells) < len(data["cells"]):
        problems.append("a cell is there twice")
    for key in expected_keys(table):
        cell = cells.get(key)
        if cell is None:
            problems.append(f"no scores of {_name(key)}")
            continue
        problems += [f"{_name(key)}: {problem}" for problem in _problems(cell, table)]
        problems += _unequal(key, cell, cells, table)
    if problems:
        shown = "\n  ".join(problems[:MAX_LISTED])
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise ConfigError(f"the comparison {table['name']} is not complete:\n  {shown}{more}")


def expected_keys(table: Mapping[str, Any]) -> list[tuple[str, float, int, int]]:
    """Return arm, guidance, budget and seed of all reported cells."""
    return [
        (arm, float(guidance), budget, seed)
        for arm, entry in table["arms"].items()
        for guidance in table["guidance"]
        for budget in scored_updates(table, entry)
        for seed in table["seeds"]
    ]


def scored_updates(table: Mapping[str, Any], entry: Mapping[str, Any]) -> list[int]:
    """Return the student updates after which an arm is scored, as `Table.scored`."""
    is_run = entry.get("kind", "run") == "run" and not entry.get("updates")
    return sorted({*table["budgets"], *(table.get("curve", []) if is_run else [])})


def read_results(path: Path) -> dict[str, Any]:
    """Read the JSON of a comparison and check it as `check_complete`.

    Raises:
        ConfigError: it is none, or not complete.
    """
    data = dict(read_json_object(path, ConfigError))
    if data.get("format") != FORMAT or not isinstance(data.get("table"), Mapping) or "cells" not in data:
        raise ConfigError(f"{path} holds no results of eval compare of format {FORMAT}")
    check_complete(data)
    return data


def last_scores(
    data: Mapping[str, Any], arm: str, guidance: float, budget: int, metric: str, step: int = -1
) -> list[float]:
    """Return a metric after a step, for each reported seed in order."""
    cells = {_key(cell): cell for cell in data["cells"]}
    return [float(cells[arm, float(guidance), budget, seed]["steps"][step][metric]) for seed in data["table"]["seeds"]]


def differences(
    data: Mapping[str, Any], arm: str, baseline: str, guidance: float, budget: int
) -> dict[str, Difference]:
    """Return the paired differences of an arm and a baseline in all tested metrics."""
    metrics = data["table"]["metrics"]
    found = {
        metric: paired(
            last_scores(data, arm, guidance, budget, metric), last_scores(data, baseline, guidance, budget, metric)
        )
        for metric in metrics
    }
    adjusted = holm([found[metric][3] for metric in metrics])
    return {metric: Difference(*found[metric], p) for metric, p in zip(metrics, adjusted, strict=True)}


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float, float]:
    """Return mean, 95% t-interval and p-value of first - second; without spread the interval is the mean."""
    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean, error = float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps)))
    if error == 0.0:
        return mean, mean, mean, 1.0 if mean == 0.0 else 0.0
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * error
    p = 2.0 * float(stats.t.sf(abs(mean) / error, len(gaps) - 1))
    return mean, mean - half, mean + half, min(p, 1.0)


def _key(cell: Mapping[str, Any]) -> tuple[str, float, int, int]:
    return cell["arm"], float(cell["guidance"]), cell["budget"], cell["seed"]


def _name(key: tuple[str, float, int, int]) -> str:
    arm, guidance, budget, seed = key
    return f"{arm} g={guidance:g} budget={budget} seed={seed}"


def _problems(cell: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    problems = [] if cell.get("steps") else ["no step was scored"]
    for number, step in enumerate(cell.get("steps", []), start=1):
        for metric in table["metrics"]:
            value = step.get(metric)
            if value is None:
                problems.append(f"{metric} is missing after step {number}")
            elif not isinstance(value, int | float) or not math.isfinite(value):
                problems.append(f"{metric} is {value} after step {number}")
    return problems


def _unequal(
    key: tuple[str, float, int, int],
    cell: Mapping[str, Any],
    cells: Mapping[tuple[str, float, int, int], Mapping[str, Any]],
    table: Mapping[str, Any],
) -> list[str]:
    arm = table["arms"][key[0]]
    base = cells.get((table["baseline"], *key[1:]))
    if base is None or arm.get("unequal") or arm.get("kind", "run") != "run":
        return []
    same = {"student_updates": (cell["student_updates"], base["student_updates"])}
    same |= {f"{role} calls": (cell["calls"][role], base["calls"][role]) for role in ("critic", "teacher")}
    return [
        f"{_name(key)}: {what} {own:,}, {table['baseline']} has {other:,}, and the arm does not say why (unequal)"
        for what, (own, other) in same.items()
        if own != other
    ]
