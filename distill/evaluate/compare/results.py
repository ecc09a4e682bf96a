"""The scores of all cells as one JSON object, and the statistics over seeds: paired t-intervals, Holm over metrics."""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from codmd_serve.errors import ConfigError
from codmd_serve.textfiles import parse_json, read_json_object
from distill.evaluate.stats import holm

FORMAT = 1
MAX_LISTED = 20
ALPHA = 0.05
ROLES = ("student", "critic", "teacher")
TABLE_KEYS = ("name", "recipe", "baseline", "arms", "guidance", "budgets", "seeds", "metrics")
CELL_KEYS = ("arm", "guidance", "budget", "seed", "student_updates", "calls", "cpu_s", "steps")
Key = tuple[str, float, int, int]
"""Arm, guidance, student updates, seed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number over seeds.

    Attributes:
        mean: over seeds.
        low, high: of its 95% interval.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference(Estimate):
    """A paired difference over seeds.

    Attributes:
        p: of the two-sided t-test.
        p_holm: adjusted for the number of metrics.
    """

    p: float
    p_holm: float

    @property
    def verdict(self) -> int:
        """-1 where the first arm is better (all tested metrics are errors), 1 where it is worse, 0 where undecided."""
        if self.p_holm >= ALPHA:
            return 0
        return -1 if self.mean < 0 else 1


@dataclass(frozen=True)
class Comparison:
    """Checked results of `eval compare`.

    Attributes:
        data: the JSON object.
        folder: of its file; paths of clips are relative to it.
    """

    data: Mapping[str, Any]
    folder: Path = Path()

    @property
    def table(self) -> Mapping[str, Any]:
        """The table, with the arms that its `start` added."""
        table: Mapping[str, Any] = self.data["table"]
        return table

    @cached_property
    def cells(self) -> dict[Key, Mapping[str, Any]]:
        """The cells."""
        return {_key(cell): cell for cell in self.data["cells"]}

    @cached_property
    def settings(self) -> list[Setting]:
        """Guidance by guidance, budget by budget, the smaller first."""
        return [
            Setting(self, float(guidance), budget)
            for guidance in self.table["guidance"]
            for budget in self.table["budgets"]
        ]

    @property
    def last_settings(self) -> list[Setting]:
        """Those of the largest budget, one for each guidance."""
        return [setting for setting in self.settings if setting.budget == self.table["budgets"][-1]]


@dataclass(frozen=True)
class Setting:
    """The cells of one guidance and one number of student updates."""

    comparison: Comparison
    guidance: float
    budget: int

    @property
    def world(self) -> str:
        """What the report calls the world, its guidance included."""
        name = str(self.comparison.table["name"])
        return name if self.guidance == 1.0 else f"{name} (guidance {self.guidance:g})"

    @property
    def place(self) -> str:
        """What files of the world are called."""
        table = self.comparison.table
        return str(table["name"]) + (f"-g{self.guidance:g}" if len(table["guidance"]) > 1 else "")

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"{self.world}, {self.budget:,} updates"

    def cell(self, arm: str, seed: int) -> Mapping[str, Any]:
        """Return the cell of an arm and a seed."""
        return self.comparison.cells[arm, self.guidance, self.budget, seed]

    def scores(self, arm: str, metric: str, step: int = -1) -> list[float]:
        """Return a metric after a step, for each reported seed in order."""
        return [float(self.cell(arm, seed)["steps"][step][metric]) for seed in self.comparison.table["seeds"]]

    def has(self, metric: str) -> bool:
        """Return whether every cell has a finite value of a metric that is not tested after its last step."""
        values = [
            self.cell(arm, seed)["steps"][-1].get(metric)
            for arm in self.comparison.table["arms"]
            for seed in self.comparison.table["seeds"]
        ]
        return all(isinstance(value, int | float) and math.isfinite(value) for value in values)

    def differences(self, arm: str, baseline: str) -> dict[str, Difference]:
        """Return the paired differences of two arms in all tested metrics, with Holm's correction over these."""
        metrics = self.comparison.table["metrics"]
        found = {metric: paired(self.scores(arm, metric), self.scores(baseline, metric)) for metric in metrics}
        adjusted = holm([found[metric][3] for metric in metrics])
        return {metric: Difference(*found[metric], p) for metric, p in zip(metrics, adjusted, strict=True)}

    def calls(self, arm: str) -> dict[str, int]:
        """Return how many samples each network was evaluated on, the largest over seeds."""
        found = [self.cell(arm, seed)["calls"] for seed in self.comparison.table["seeds"]]
        return {role: max(int(calls[role]) for calls in found) for role in found[0]}

    def cpu_s(self, arm: str) -> float:
        """Return the CPU seconds of training up to this budget, mean over seeds.

        A cell has those of its own part of a run; an arm that no budget changes has all in each cell, or in the first.
        """
        table, cells = self.comparison.table, self.comparison.cells
        entry = table["arms"][arm]
        parts = [count for count in scored_updates(table, entry) if count <= self.budget]
        found = [[float(cells[arm, self.guidance, count, seed]["cpu_s"]) for count in parts] for seed in table["seeds"]]
        return fmean(max(own) if entry.get("updates") else sum(own) for own in found)


def check_complete(data: Mapping[str, Any]) -> None:
    """Refuse results that lack a cell, a metric or a number, or whose runs cost more or less than they declare.

    Raises:
        ConfigError: lists what is wrong; nothing is ever filled in.
    """
    table, problems = data["table"], _malformed(data)
    if not problems:
        cells = {_key(cell): cell for cell in data["cells"]}
        if len(cells) < len(data["cells"]):
            problems.append("a cell is there twice")
        for key in expected_keys(table):
            cell = cells.get(key)
            if cell is None:
                problems.append(f"no scores of {_name(key)}")
                continue
            own = [*_problems(cell, table), *_matrix_problems(cell)]
            first = cells.get((*key[:3], table["seeds"][0]), cell)
            if len(first["steps"]) != len(cell["steps"]):
                own.append(f"{len(cell['steps'])} steps, its first seed has {len(first['steps'])}")
            problems += [f"{_name(key)}: {problem}" for problem in own]
            problems += _unequal(key, cell, cells, table)
    if problems:
        shown = "\n  ".join(problems[:MAX_LISTED])
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise ConfigError(f"the comparison {table['name']} is not complete:\n  {shown}{more}")


def expected_keys(table: Mapping[str, Any]) -> list[Key]:
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


def read_results(path: Path) -> Comparison:
    """Read the JSON of a comparison, packed as .gz or not, and check it as `check_complete`.

    Raises:
        ConfigError: it is none, or not complete.
    """
    data = _read_object(path)
    if data.get("format") != FORMAT or not isinstance(data.get("table"), Mapping) or "cells" not in data:
        raise ConfigError(f"{path} holds no results of eval compare of format {FORMAT}")
    check_complete(data)
    if len(data["table"]["seeds"]) < 2:
        raise ConfigError(
            f"{path} has scores of seed {data['table']['seeds'][0]} alone: an interval is over seeds, give 2 or more"
        )
    return Comparison(data, path.parent)


def _read_object(path: Path) -> dict[str, Any]:
    if path.suffix != ".gz":
        return read_json_object(path, ConfigError)
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}") from problem
    data = parse_json(text, str(path), ConfigError)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold one JSON object, got {type(data).__name__}")
    return data


def interval(values: Sequence[float]) -> Estimate:
    """Return mean and 95% t-interval of values; without spread the interval is the mean."""
    mean, low, high, _ = paired(values, [0.0] * len(values))
    return Estimate(mean, low, high)


def share_closed(arm: Sequence[float], baseline: Sequence[float], floor: Sequence[float]) -> Estimate | None:
    """Return which share of the gap between baseline and floor an arm closes, 1 is all, with Fieller's 95% interval.

    Args:
        arm, baseline, floor: an error for each seed, in one order.

    Returns:
        None where the seeds do not show that there is a gap: baseline - floor is not above 0 by its 95% t-interval.

    Source: Fieller, Journal of the Royal Statistical Society B 16 (1954), for a ratio of paired means.
    """
    moved, gap = np.subtract(baseline, arm), np.subtract(baseline, floor)
    count = len(gap)
    quantile = float(stats.t.ppf(0.975, count - 1)) ** 2 / count
    covariance = np.cov(moved, gap)
    top, bottom = float(moved.mean()), float(gap.mean())
    square = bottom**2 - quantile * covariance[1, 1]
    if bottom <= 0 or square <= 0:
        return None
    cross = top * bottom - quantile * covariance[0, 1]
    root = math.sqrt(max(cross**2 - square * (top**2 - quantile * covariance[0, 0]), 0.0))
    return Estimate(top / bottom, float(cross - root) / float(square), float(cross + root) / float(square))


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float, float]:
    """Return mean, 95% t-interval and p-value of first - second; without spread the interval is the mean."""
    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean, error = float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps)))
    if error == 0.0:
        return mean, mean, mean, 1.0 if mean == 0.0 else 0.0
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * error
    p = 2.0 * float(stats.t.sf(abs(mean) / error, len(gaps) - 1))
    return mean, mean - half, mean + half, min(p, 1.0)


def _key(cell: Mapping[str, Any]) -> Key:
    return cell["arm"], float(cell["guidance"]), cell["budget"], cell["seed"]


def _name(key: Key) -> str:
    arm, guidance, budget, seed = key
    return f"{arm} g={guidance:g} budget={budget} seed={seed}"


def _malformed(data: Mapping[str, Any]) -> list[str]:
    table, cells = data["table"], data["cells"]
    missing = [key for key in TABLE_KEYS if key not in table]
    if missing:
        return [f"the table has no {', '.join(missing)}"]
    if table["baseline"] not in table["arms"]:
        return [f"the baseline {table['baseline']} is no arm"]
    problems = []
    for place, cell in enumerate(cells):
        missing = [key for key in CELL_KEYS if key not in cell]
        missing += [f"calls of {role}" for role in ROLES if not missing and role not in cell["calls"]]
        if missing:
            problems.append(f"cell {place} has no {', '.join(missing)}")
    return problems


def _problems(cell: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    problems = [] if cell["steps"] else ["no step was scored"]
    for number, step in enumerate(cell["steps"], start=1):
        for metric in table["metrics"]:
            if metric not in step or step[metric] is None:
                problems.append(f"{metric} is missing after step {number}")
            elif not isinstance(step[metric], int | float) or isinstance(step[metric], bool):
                problems.append(f"{metric} is {step[metric]!r} after step {number}")
        # Those that are only shown, too.
        for metric, value in step.items():
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{metric} is {value} after step {number}")
    return problems


def _matrix_problems(cell: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, rows in cell.get("matrices", {}).items():
        values = [value for row in rows for value in row]
        if any(len(row) != len(rows) for row in rows) or not rows:
            problems.append(f"matrix {name} is not square")
        elif not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            problems.append(f"matrix {name} holds what is no number")
    return problems


def _unequal(
    key: Key,
    cell: Mapping[str, Any],
    cells: Mapping[Key, Mapping[str, Any]],
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
