"""Formats a ShapeBench report as Markdown; computes no score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.evaluate.report import (
    FOLLOWING,
    FORM,
    HEADROOM_WANTED,
    JOINT,
    RETENTION_WANTED,
    VIDEO_METRICS,
    Analysis,
    Metric,
    comparisons,
    headroom,
    targets,
)


def as_markdown(analysis: Analysis, students: Sequence[str], settings: dict[str, object]) -> str:
    """Return the whole report.

    Args:
        analysis: of all arms.
        students: names of the arms that are students.
        settings: printed at the top, so that the numbers can be had again.
    """
    blocks = [
        "# ShapeBench",
        ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None),
        "## Caption following",
        "Share of clips whose pixels say what the caption says. 1: and 2: are captions of one and of two objects, the "
        "other columns are all captions.",
        _score_table(analysis, FOLLOWING),
        "## Video",
        "^ higher is better, v lower is better. Saturation error is signed and 0 is right; dynamic is right when it "
        "equals the ground truth's. PSNR is against the ground-truth renders.",
        _score_table(analysis, VIDEO_METRICS, has_psnr=any(arm.psnr_db is not None for arm in analysis.arms.values())),
    ]
    blocks += [
        "## Form",
        "Overlap (intersection over union) of every object's pixels with the ideal shape fitted to it, 1 is right: "
        "mean over frames, the worst frame of a clip, and the share of clips whose worst frame is at least .75. It "
        "sees an octagon for a circle and a torn ring, which the caption scores do not.",
        _score_table(analysis, FORM),
    ]
    if analysis.suite.depth:
        blocks += [
            "## What the caption leaves open",
            f"Many seeds of {len(analysis.suite.depth)} captions. Diversity is the spread over seeds relative to the "
            "ground truth's, 1 is right. Marginal is the mean Wasserstein distance of the factors in standard "
            "deviations of the truth, dependence the mean error of Kendall's tau over the tied pairs; the ground "
            "truth's own row is the floor that this many samples allow.",
            _score_table(analysis, JOINT),
            _tau_table(analysis),
        ]
    if comparisons(analysis, students):
        blocks += [
            "## Paired differences",
            "First less second on the same captions and noise, with 95% bootstrap intervals clustered by caption "
            "(dependence: by seed). * marks an interval without 0.",
            _difference_table(analysis, students),
        ]
    blocks += [*_headroom_lines(analysis), *(line for name in students for line in _target_lines(analysis, name))]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _score_table(analysis: Analysis, group: Sequence[Metric], has_psnr: bool = False) -> str:
    metrics = analysis.metrics(group)
    rows = []
    for name, arm in analysis.arms.items():
        cells = [_format_value(analysis.value(metric, name).mean, metric) for metric in metrics]
        if has_psnr:
            cells.append("" if arm.psnr_db is None else f"{arm.psnr_db:.1f}")
        rows.append([arm.label, *cells])
    return _table(["", *(metric.heading for metric in metrics), *(["PSNR (dB)"] if has_psnr else [])], rows)


def _tau_table(analysis: Analysis) -> str:
    truth = analysis.taus(None)
    rows = [["reference renders", *map(_tau, truth.values())]]
    rows += [[arm.label, *map(_tau, analysis.taus(name).values())] for name, arm in analysis.arms.items()]
    return _table(["Kendall's tau", *truth], rows)


def _difference_table(analysis: Analysis, students: Sequence[str]) -> str:
    pairs = comparisons(analysis, students)
    rows = []
    for metric in analysis.metrics():
        cells = []
        for first, second in pairs:
            gap = analysis.difference(metric, first, second)
            mark = "*" if gap.low > 0 or gap.high < 0 else ""
            cells.append("" if np.isnan(gap.mean) else f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]{mark}")
        rows.append([metric.key, *cells])
    return _table(["", *(f"{first} - {second}" for first, second in pairs)], rows)


def _headroom_lines(analysis: Analysis) -> list[str]:
    rows = headroom(analysis)
    if not rows:
        return []
    cells = [
        [
            f"{row['arm']}: {row['metric']}",
            f"{row['behind']:+.3f}",
            f"{row['unit']:.3f}",
            "-" if row["units"] is None else f"{row['units']:+.1f}",
            "yes" if row["enough"] else "no",
        ]
        for row in rows
    ]
    text = (
        "How far few steps fall behind many, in units of what two samples with many steps differ by (the larger of "
        f"that difference and its bootstrap standard deviation); {HEADROOM_WANTED:g} units are wanted; "
        "a dash where the two samples score alike, so that there is no unit."
    )
    return ["## Headroom", text, _table(["", "behind by", "unit", "units", "enough"], cells)]


def _target_lines(analysis: Analysis, student: str) -> list[str]:
    judged = targets(analysis, student)
    lines = [f"## {student} against its targets"]
    shares = judged.get("share_of_teacher")
    if isinstance(shares, dict) and shares:
        least = min(shares, key=lambda key: shares[key])
        below = judged["below_wanted_share"]
        names = ", ".join(f"{key} {shares[key]:.2f}" for key in below) if isinstance(below, list) and below else "none"
        lines.append(
            f"Caption following, share of the teacher's: least {shares[least]:.2f} ({least}); "
            f"below {RETENTION_WANTED:g}: {names}."
        )
    for other in ("few", "few_unguided"):
        worse = judged.get(f"worse_than_{other}")
        if isinstance(worse, list):
            label = analysis.arms[other].label
            lines.append(f"Video and joint scores worse than {label}: {', '.join(worse) or 'none'}.")
    return lines


def _format_value(value: float, metric: Metric) -> str:
    if np.isnan(value):
        return ""
    return f"{value:+.3f}" if metric.key == "saturation" else f"{value:.3f}"


def _tau(value: float) -> str:
    return "" if np.isnan(value) else f"{value:+.2f}"
