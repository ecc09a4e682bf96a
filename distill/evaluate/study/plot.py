"""Draws the result of a study as stacked bars, as figure 4 of the CoDMD paper: one bar for each pair and question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codmd_serve.files import atomic_file

# Two hues that stay apart for colour-blind eyes, and greys between them.
COLOURS = {"first": "#4338ca", "same": "#cbd5e1", "bad": "#94a3b8", "second": "#ea7317"}
BAR_INCHES, HEAD_INCHES, WIDTH_INCHES = 0.46, 1.5, 9.0
MIN_LABEL_SHARE = 0.06


def draw_result(numbers: dict[str, Any], first_line: str, target: Path) -> None:
    """Write the PNG.

    Args:
        numbers: of `analysis.analyse`; the raters who passed the catch trials are drawn.
        first_line: of the report; stands above the bars.
        target: the file, replaced when there.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = numbers["passed"]["pairs"]
    figure = Figure(figsize=(WIDTH_INCHES, HEAD_INCHES + BAR_INCHES * max(len(rows), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        start = 0.0
        for name, colour in COLOURS.items():
            share = row["shares"][name]
            axes.barh(place, share, left=start, color=colour, height=0.66)
            if share >= MIN_LABEL_SHARE:
                ink = "#0f172a" if name in ("same", "bad") else "white"
                axes.text(start + share / 2, place, f"{100 * share:.0f}", ha="center", va="center", color=ink)
            start += share
        rate = row["win_rate"]
        if rate["low"] is not None:
            span = [[rate["value"] - rate["low"]], [rate["high"] - rate["value"]]]
            # Below the bar, where it crosses no number.
            axes.errorbar(rate["value"], place + 0.44, xerr=span, fmt="o", color="#0f172a", ms=3.5, capsize=2.5, lw=1.1)
        axes.text(1.01, place, row["verdict"], va="center", fontsize="small", color="#334155")
    axes.set_yticks(
        range(len(rows)), [f"{row['first']} / {row['second']}: {row['question']}" for row in rows], fontsize="small"
    )
    axes.invert_yaxis()
    axes.axvline(0.5, color="#0f172a", lw=0.8, ls=":")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    labels = {"first": "first is better", "same": "same", "bad": "both bad", "second": "second is better"}
    handles = [axes.barh(0, 0, color=COLOURS[name], label=label) for name, label in labels.items()]
    figure.suptitle(first_line, fontsize="medium", wrap=True)
    axes.legend(
        handles=handles, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small"
    )
    axes.set_xlabel("share of votes; the dot is the win rate of the first with its 95 % interval", fontsize="small")
    with atomic_file(target) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
