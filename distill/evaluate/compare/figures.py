"""All figures of a report with their captions, and each of them as SVG or as a small PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from distill.evaluate.compare.matrices import matrices, matrix_names
from distill.evaluate.compare.plots import curves, forest, overview, step_arms, steps
from distill.evaluate.compare.results import Comparison, Setting

PNG_DPI, PNG_COLOURS = 100, 128


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure of the report.

    Attributes:
        key: where it stands, and the name of its file.
        caption: what is to be seen.
        draw: makes it.
        is_kept: it stands in the Markdown too, as a file.
    """

    key: str
    caption: str
    draw: Callable[[], Figure]
    is_kept: bool = True


def all_plots(comparisons: Sequence[Comparison]) -> list[Plot]:
    """Return the figures of a report; those without data are left out."""
    base = comparisons[0].table["baseline"]
    plots = [
        Plot(
            "overview",
            "Errors of the main arms at the largest budget, after the last step; left is better, axes are logarithmic "
            f"where all are above 0. Between {base} (line) and the floor (dashed) lies the gap that a method can "
            "close.",
            lambda: overview(comparisons),
        )
    ]
    for own in comparisons:
        for last in own.last_settings:
            plots += _of_world(own, last)
    return plots


def _of_world(own: Comparison, last: Setting) -> list[Plot]:
    guidance, base, budget = last.guidance, own.table["baseline"], f"{last.budget:,} updates"
    found = [
        Plot(
            f"{last.place}-curves",
            f"{last.world}: scores over training, mean and range over {len(own.table['seeds'])} seeds; lower is better "
            "but for kept and tau_kept. Horizontal: the truth, the few-step teacher, the network every student starts "
            "from, and the regressed start alone.",
            lambda: curves(own, guidance),
        ),
        Plot(
            f"{last.place}-forest",
            f"{last.name}: difference from {base} with 95% t-interval. Left of 0 is better; filled: p < .05 after "
            "Holm; an arrow is farther away than there is room.",
            lambda: forest(last),
            is_kept=False,
        ),
    ]
    if any(len(last.cell(arm, own.table["seeds"][0])["steps"]) > 1 for arm in step_arms(own.table)):
        found.append(
            Plot(
                f"{last.place}-steps",
                f"{last.world}, {budget}: scores after every step of the sampler, mean over seeds.",
                lambda: steps(own, guidance),
                is_kept=False,
            )
        )
    if matrix_names(last):
        found.append(
            Plot(
                f"{last.place}-matrices",
                f"{last.world}, {budget}: dependence after the last step, means over captions and seeds, and its "
                "difference from the truth's (mean size beside the name). One colour scale for values, one for "
                "differences.",
                lambda: matrices(last),
            )
        )
    return found


def as_svg(figure: Figure) -> str:
    """Return a figure as an SVG element; the same figure gives the same text."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "evidence", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def as_png(figure: Figure) -> bytes:
    """Return a figure as a PNG of few colours."""
    FigureCanvasAgg(figure)
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI)
    picture = Image.open(buffer).convert("RGB")
    picture = picture.quantize(PNG_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(small, format="PNG", optimize=True)
    return small.getvalue()
