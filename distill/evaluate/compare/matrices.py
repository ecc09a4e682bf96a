"""The dependence matrices of the report: what a few arms make of the truth's dependence, and what is off."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from distill.evaluate.compare.results import Setting
from distill.evaluate.compare.roles import control_pairs, few_steps_of, started, truth_of

NAMES = {"tau": "Kendall's tau\nbetween factors", "rho": "Spearman's rho\nbetween frames"}
MAP = "RdBu_r"
LEAST_SCALE = 0.02


def matrix_arms(setting: Setting) -> list[str]:
    """Return the arms that are drawn, the truth first: few-step teacher, baseline, term, control, started baseline."""
    table = setting.comparison.table
    pairs = [arm for pair in control_pairs(table)[:1] for arm in pair]
    wanted = [truth_of(table), few_steps_of(table), table["baseline"], *pairs, started(table["baseline"])]
    return [arm for arm in wanted if arm in table["arms"]]


def matrix_names(setting: Setting) -> list[str]:
    """Return which matrices there are to draw: those of one size in all cells of the arms, the truth among them."""
    table, arms = setting.comparison.table, matrix_arms(setting)
    cells = [setting.cell(arm, seed).get("matrices", {}) for arm in arms for seed in table["seeds"]]
    sizes = {name: {len(cell[name]) if name in cell else 0 for cell in cells} for name in NAMES}
    return [name for name, found in sizes.items() if truth_of(table) and len(found) == 1 and 0 not in found]


def mean_matrix(setting: Setting, arm: str, name: str) -> np.ndarray:
    """Return a matrix of an arm, the mean over seeds."""
    found = [setting.cell(arm, seed)["matrices"][name] for seed in setting.comparison.table["seeds"]]
    mean: np.ndarray = np.asarray(found, dtype=float).mean(0)
    return mean


def matrices(setting: Setting) -> Figure:
    """Draw each matrix of each arm, and below it the difference from the truth; one scale for each of both."""
    arms, names = matrix_arms(setting), matrix_names(setting)
    found = {(arm, name): mean_matrix(setting, arm, name) for arm in arms for name in names}
    gaps = {(arm, name): own - found[arms[0], name] for (arm, name), own in found.items()}
    scale = max(LEAST_SCALE, *(float(np.abs(gap).max()) for gap in gaps.values()))
    figure = Figure(figsize=(1.3 + 1.4 * len(arms), 1.62 * 2 * len(names)), layout="constrained")
    grid = figure.add_gridspec(2 * len(names), len(arms) + 1, width_ratios=[*[1.0] * len(arms), 0.06])
    for row, name in enumerate(names):
        for is_gap, matrix, limit in ((False, found, 1.0), (True, gaps, scale)):
            place, image = 2 * row + is_gap, None
            for column, arm in enumerate(arms):
                if is_gap and not column:
                    continue
                panel = figure.add_subplot(grid[place, column])
                image = panel.imshow(_off(matrix[arm, name]), cmap=MAP, vmin=-limit, vmax=limit)
                panel.set(xticks=[], yticks=[])
                panel.set_title(f"{arm}, {_size(matrix[arm, name]):.3f}" if is_gap else arm, fontsize=8)
                if column == is_gap:
                    panel.set_ylabel("less the truth's" if is_gap else NAMES[name], fontsize=8)
            if image is not None:
                bar = figure.colorbar(image, cax=figure.add_subplot(grid[place, len(arms)]))
                bar.ax.tick_params(labelsize=7)
    return figure


def _size(matrix: np.ndarray) -> float:
    """Return the mean size of the entries off the diagonal."""
    return float(np.abs(matrix[~np.eye(len(matrix), dtype=bool)]).mean())


def _off(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix without its diagonal, which is 1 in all of them."""
    own = matrix.copy()
    np.fill_diagonal(own, np.nan)
    return own
