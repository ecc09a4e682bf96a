"""Draws when the stages of consecutive requests ran; knows spans and no engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Told apart without colour by their lanes.
LANES = ("text", "denoise", "decode", "encode")
BAR_COLOURS = ("#005ab5", "#dc3220", "#5a5a5a", "#e69f00")

# (stage, start, end) in seconds of one clock
StageSpan = tuple[str, float, float]


def draw_timeline(path: Path, title: str, requests: Sequence[Sequence[StageSpan]]) -> None:
    """Write a PNG with one lane per stage and one colour per request.

    Args:
        path: of the file.
        title: over the picture.
        requests: the spans of each; at least one span in all.
    """
    first_s = min(start for spans in requests for _, start, _ in spans)
    figure = Figure(figsize=(9.6, 3.6), dpi=100, layout="constrained")
    axes: Any = figure.add_subplot()
    for number, spans in enumerate(requests):
        for index, (stage, start, end) in enumerate(spans):
            label = f"request {number + 1}" if index == 0 else None
            bar = [(1000 * (start - first_s), 1000 * (end - start))]
            place = (LANES.index(stage) - 0.35, 0.7)
            axes.broken_barh(bar, place, color=BAR_COLOURS[number % len(BAR_COLOURS)], edgecolor="white", label=label)
    axes.set_yticks(range(len(LANES)), LANES)
    axes.set_ylim(len(LANES) - 0.5, -0.5)
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", color="#e1e1e1")
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path)


def overlap_s(requests: Sequence[Sequence[StageSpan]]) -> float:
    """Return the seconds in which one request was encoded while a later one was in another stage."""
    return sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for number, spans in enumerate(requests)
        for stage, start, end in spans
        if stage == "encode"
        for later in requests[number + 1 :]
        for other, other_start, other_end in later
        if other != "encode"
    )
