"""Scores over training checkpoints: the points of a curve, its table, and its plot with intervals as ribbons."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from codmd_serve.errors import ConfigError
from codmd_serve.files import write_bytes
from distill.evaluate.vbench.facts import Preset, missing_dimensions
from distill.evaluate.vbench.results import DimensionResult
from distill.evaluate.vbench.score import Row, read_scores, summary

PLOTS_PER_LINE = 4


def read_points(arguments: list[str], *, failed_as_zero: bool = False) -> dict[int, dict[str, DimensionResult]]:
    """Read the scores of every checkpoint.

    Args:
        arguments: ITERATION=PATH each, where PATH is what `read_scores` reads.
        failed_as_zero: see there.

    Raises:
        ConfigError: another form, an iteration given twice, fewer than two points, or points with different
            dimensions, with the list.
    """
    points: dict[int, dict[str, DimensionResult]] = {}
    for argument in arguments:
        number, sign, path = argument.partition("=")
        if not sign or not (number.isascii() and number.isdecimal()):
            raise ConfigError(f"a point of the curve is ITERATION=FOLDER, got {argument}")
        if int(number) in points:
            raise ConfigError(f"iteration {int(number)} is given twice")
        points[int(number)] = read_scores([Path(path)], failed_as_zero=failed_as_zero)
    if len(points) < 2:
        raise ConfigError("a curve needs two points or more")
    everything = {name for results in points.values() for name in results}
    for iteration, results in points.items():
        missing = missing_dimensions(set(results), tuple(sorted(everything)))
        if missing:
            raise ConfigError(f"iteration {iteration} lacks {', '.join(missing)}: score it, or leave the point out")
    return dict(sorted(points.items()))


def curve_rows(
    points: Mapping[int, Mapping[str, DimensionResult]], preset: Preset, *, is_partial: bool, seed: int
) -> dict[int, list[Row]]:
    """Return the rows of `summary` for every point."""
    return {
        iteration: summary(results, preset, is_partial=is_partial, seed=seed) for iteration, results in points.items()
    }


def curve_table(rows: Mapping[int, list[Row]]) -> str:
    """Return a Markdown table: a line for each score, a column for each iteration."""
    names = [row.name for row in next(iter(rows.values()))]
    head = ["| score |" + "".join(f" {iteration} |" for iteration in rows), "|---|" + "---|" * len(rows)]
    body = []
    for place, name in enumerate(names):
        body.append(f"| {name} |" + "".join(f" {cell(points[place])} |" for points in rows.values()))
    return "\n".join([*head, *body]) + "\n"


def cell(row: Row) -> str:
    """Return a score with its interval, where there is one."""
    return f"{row.value:.2f}" if math.isnan(row.low) else f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


def curve_json(rows: Mapping[int, list[Row]]) -> dict[str, Any]:
    """Return the rows as JSON values; None for an interval that is not known."""
    return {
        str(iteration): [
            {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(r).items()}
            for r in points
        ]
        for iteration, points in rows.items()
    }


def plot_curve(rows: Mapping[int, list[Row]], path: Path) -> None:
    """Draw every score over the iterations, intervals as ribbons, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    iterations = list(rows)
    names = [row.name for row in rows[iterations[0]]]
    num_lines = math.ceil(len(names) / PLOTS_PER_LINE)
    figure = Figure(figsize=(3.2 * min(PLOTS_PER_LINE, len(names)), 2.2 * num_lines), layout="constrained")
    axes = figure.subplots(num_lines, min(PLOTS_PER_LINE, len(names)), squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.set_axis_off()
            continue
        points = [rows[iteration][place] for iteration in iterations]
        axis.plot(iterations, [point.value for point in points], marker="o", markersize=3)
        if not any(math.isnan(point.low) for point in points):
            axis.fill_between(
                iterations, [point.low for point in points], [point.high for point in points], alpha=0.25, linewidth=0
            )
        axis.set_title(names[place].replace("_", " "), fontsize=8)
        axis.tick_params(labelsize=7)
    figure.supxlabel("iteration", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(path, buffer.getvalue())
