"""The plots of the report, as SVG, of the JSON alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from distill.evaluate.compare.report import compared
from distill.evaluate.compare.results import differences, last_scores

COLUMNS = 3


def all_plots(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return caption and SVG of each plot of a comparison."""
    table = data["table"]
    plots = []
    for guidance in table["guidance"]:
        where = f"{table['recipe']}, guidance {guidance:g}"
        plots.append(
            (
                f"{where}, {table['budgets'][-1]:,} updates: difference from {table['baseline']} with 95% t-interval "
                f"over {len(table['seeds'])} seeds. Left of 0 is better; filled: p < .05 after Holm.",
                forest(data, guidance, table["budgets"][-1]),
            )
        )
        plots.append((f"{where}: scores over training, mean and range over seeds.", curves(data, guidance)))
        if any(len(cell["steps"]) > 1 for cell in data["cells"]):
            plots.append((f"{where}: scores after every step of the student, mean over seeds.", steps(data, guidance)))
    return plots


def forest(data: Mapping[str, Any], guidance: float, budget: int) -> str:
    """Draw the paired differences of all runs from the baseline, one panel per metric."""
    table = data["table"]
    pairs = [pair for pair in compared(table) if pair[1] == table["baseline"]]
    gaps = {arm: differences(data, arm, base, guidance, budget) for arm, base in pairs}
    figure, axes = _panels(table["metrics"], 1.2 + 0.22 * len(pairs))
    for metric, panel in zip(table["metrics"], axes, strict=True):
        for place, (arm, _) in enumerate(pairs):
            gap = gaps[arm][metric]
            panel.plot([gap.low, gap.high], [place, place], color="#4477aa", linewidth=1.2)
            fill = "#4477aa" if gap.p_holm < 0.05 else "white"
            panel.plot([gap.mean], [place], marker="o", markersize=4, color="#4477aa", markerfacecolor=fill)
        panel.axvline(0.0, color="#888888", linewidth=0.8)
        panel.set_yticks(range(len(pairs)), [arm for arm, _ in pairs], fontsize=6)
        panel.invert_yaxis()
        panel.set_title(metric, fontsize=9)
        panel.tick_params(axis="x", labelsize=7)
    return _svg(figure)


def curves(data: Mapping[str, Any], guidance: float) -> str:
    """Draw each metric over the budgets, with a ribbon from the lowest to the highest seed."""
    table = data["table"]
    runs = [arm for arm, entry in table["arms"].items() if entry.get("kind", "run") == "run"]
    names = (*table["metrics"], "kept", "tau_kept")
    figure, axes = _panels(names, 3.0)
    for metric, panel in zip(names, axes, strict=True):
        for arm in runs:
            values = [last_scores(data, arm, guidance, budget, metric) for budget in table["budgets"]]
            means = [fmean(own) for own in values]
            (line,) = panel.plot(table["budgets"], means, marker=".", linewidth=1.0, label=arm)
            low, high = [min(own) for own in values], [max(own) for own in values]
            panel.fill_between(table["budgets"], low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        panel.set_title(metric, fontsize=9)
        panel.tick_params(labelsize=7)
    axes[0].legend(fontsize=5, ncols=2)
    return _svg(figure)


def steps(data: Mapping[str, Any], guidance: float) -> str:
    """Draw each metric after every step, at the largest budget."""
    table = data["table"]
    budget, seed = table["budgets"][-1], table["seeds"][0]
    cells = {(cell["arm"], cell["budget"], cell["seed"], float(cell["guidance"])): cell for cell in data["cells"]}
    names = (*table["metrics"], "kept", "tau_kept", "copying")
    figure, axes = _panels(names, 3.0)
    for metric, panel in zip(names, axes, strict=True):
        for arm in table["arms"]:
            count = len(cells[arm, budget, seed, float(guidance)]["steps"])
            if count < 2:
                continue
            means = [fmean(last_scores(data, arm, guidance, budget, metric, step)) for step in range(count)]
            panel.plot(range(1, count + 1), means, marker=".", linewidth=1.0, label=arm)
        panel.set_title(metric, fontsize=9)
        panel.tick_params(labelsize=7)
    axes[0].legend(fontsize=5, ncols=2)
    return _svg(figure)


def _panels(names: Sequence[str], height: float) -> tuple[Figure, list[Any]]:
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, height * rows), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, [figure.add_subplot(rows, COLUMNS, place) for place in range(1, len(names) + 1)]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
