"""The curves of a run: one panel per number of its log and its validations, and the same as CSV; reads their files."""

import csv
import io
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from codmd_serve.files import atomic_file, write_text
from distill.run.log import ITERATION_KEY, LOG_FILE, VALIDATION_FILE, iteration_of

CURVES_FILE, TABLE_FILE = "curves.png", "curves.csv"
# The x axis of all panels, and numbers that describe the machine or the clock.
NOT_DRAWN = (ITERATION_KEY, "step", "elapsed_s", "eta_s", "student_updates", "seconds", "best_iteration", "num_worse")
COLUMNS = 3
# Iterations and values by name.
Curves = dict[str, tuple[list[int], list[float]]]

logger = logging.getLogger(__name__)


def write_curves(out: Path) -> None:
    """Write picture and table of a run. What cannot be written is logged, training goes on."""
    curves = {**read_curves(out / LOG_FILE), **read_curves(out / VALIDATION_FILE)}
    if curves:
        plot_curves(curves, out / CURVES_FILE)
        write_table(curves, out / TABLE_FILE)


def write_table(curves: Curves, path: Path) -> None:
    """Write CSV: a row for each iteration that has a number, a column for each name; an empty cell is no number."""
    by_name = {name: dict(zip(*points, strict=True)) for name, points in curves.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([ITERATION_KEY, *by_name])
    for iteration in sorted({iteration for iterations, _ in curves.values() for iteration in iterations}):
        writer.writerow([iteration, *(values.get(iteration, "") for values in by_name.values())])
    try:
        write_text(path, text.getvalue())
    except OSError as error:
        logger.warning("no curves path=%s reason=%s", path.name, error)


def plot_curves(curves: Curves, picture: Path) -> None:
    """Draw every number over the iteration. A picture that cannot be written is logged, training goes on.

    Args:
        curves: of `read_curves`.
        picture: PNG to write.
    """
    try:
        with atomic_file(picture) as temporary:
            temporary.write_bytes(draw_runs({"": curves}))
    except OSError as error:
        logger.warning("no curves path=%s reason=%s", picture.name, error)


def draw_runs(runs: Mapping[str, Curves]) -> bytes:
    """Draw every number of several runs over the iteration, one panel per name.

    Args:
        runs: of `read_curves`, by what the legend calls them; a single run needs no legend.

    Returns:
        A PNG.
    """
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    rows = -(-len(names) // COLUMNS)
    height = 2.4 * rows
    figure = Figure(figsize=(4.0 * COLUMNS, height))
    # By hand: matplotlib's layout engines take as long as all of the drawing.
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.5 / height, top=1 - 0.3 / height, hspace=0.4, wspace=0.2)
    # Not pyplot: that keeps figures and picks a window system.
    FigureCanvasAgg(figure)
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        # A run without the number draws an empty line, so that each run has one colour in all panels.
        for label, curves in runs.items():
            iterations, values = curves.get(name, ([], []))
            marker = "." if len(iterations) < 30 else ""
            axes.plot(iterations, values, linewidth=0.9, marker=marker, label=label if iterations else "_")
        if len(runs) > 1:
            axes.legend(fontsize=6)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.supxlabel("iteration", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def read_curves(log: Path) -> Curves:
    """Return iterations and values by name, in the order of their first line.

    None stands for a value that was not finite and is left out; so are names that never had a value.
    """
    curves: Curves = {}
    lines = log.read_text(encoding="utf-8").split("\n") if log.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for name, value in record.items():
            if name not in NOT_DRAWN and isinstance(value, int | float) and math.isfinite(value):
                iterations, values = curves.setdefault(name, ([], []))
                iterations.append(iteration_of(record))
                values.append(value)
    return curves
