"""The picture of curve.json: error of every factor that captions leave open, over the clips that the teacher has seen.

Reads the file and nothing else.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from codmd_serve.errors import CheckpointError
from codmd_serve.files import atomic_file
from codmd_serve.textfiles import read_json_object

CURVE_PICTURE = "curve.png"
MARGINAL_BAR, TAU_BAR = 0.4, 0.15


def plot_factor_curve(curve: Path, picture: Path) -> None:
    """Draw marginal errors, errors of Kendall's tau, and the share of clips where everything is right.

    Args:
        curve: curve.json of a teacher's run.
        picture: PNG to write, whole or not at all.

    Raises:
        CheckpointError: the curve cannot be read, or has no rows.
    """
    data = read_json_object(curve, CheckpointError)
    try:
        rows: list[dict[str, Any]] = data["rows"]
        seen = [clips / 1e6 for clips in _clips_seen(rows)]
        panels = [
            ("distance of each factor's law (W1 / sd)", MARGINAL_BAR, _by_name(rows, "marginal")),
            ("error of Kendall's tau", TAU_BAR, _tau_errors(rows)),
            ("everything as the caption says", None, {"all": [row["all"] for row in rows]}),
        ]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{curve} is no curve of a teacher: {error}") from error
    if not rows:
        raise CheckpointError(f"{curve} has no measurement yet")
    figure = Figure(figsize=(13.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, bar, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for index, (name, values) in enumerate(lines.items()):
            axes.plot(seen, values, marker=".", linewidth=1.0, linestyle="--" if index >= 10 else "-", label=name)
        if bar is not None:
            axes.axhline(bar, color="black", linewidth=0.8, linestyle=":", label=f"bar {bar:g}")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("clips seen, millions", fontsize=8)
        axes.set_ylim(bottom=0.0)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _clips_seen(rows: list[dict[str, Any]]) -> list[float]:
    """Return the clips of each row; the last one does not know its step, and lies where the run's progress puts it."""
    seen: list[float] = []
    for before, row in zip([None, *rows], rows, strict=False):
        if row["clips_seen"] is not None:
            seen.append(float(row["clips_seen"]))
        else:
            seen.append(seen[-1] * row["progress"] / before["progress"] if before is not None else 0.0)
    return seen


def _by_name(rows: list[dict[str, Any]], key: str) -> dict[str, list[float]]:
    return {name: [float(row[key][name]) for row in rows] for name in rows[0][key]} if rows else {}


def _tau_errors(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    pairs = rows[0]["tau"] if rows else {}
    return {pair: [abs(float(row["tau"][pair]) - float(row["tau_truth"][pair])) for row in rows] for pair in pairs}


def main() -> int:
    """Draw one curve: `python -m distill.pretrain.curve_plot CURVE.json PICTURE.png`."""
    parser = argparse.ArgumentParser(description="Draw the curve.json of a teacher's run.")
    parser.add_argument("curve", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    plot_factor_curve(args.curve, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
