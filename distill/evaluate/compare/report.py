"""The report of comparisons, made of their JSON alone: markdown, and the same as one HTML file with plots."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from distill.evaluate.compare.results import Difference, differences, last_scores
from distill.evaluate.compare.table import START_SUFFIX
from distill.evaluate.vbench.facts import CITED, SPREAD_NOTE

ALPHA = 0.05
# Shown beside the tested metrics; `kept` and `tau_kept` have a sign: below 1 dependence is lost, above 1 overstated.
SIGNED = ("kept", "tau_kept", "sd_ratio", "copying")
ROLES = ("student", "critic", "teacher")
LIMITS = (
    "What this does not show: the worlds are Gaussian mixtures of 128 dimensions and the networks are MLPs of 194,000 "
    "parameters that share nothing over frames. A difference here says that a method can do something, and a null "
    "result that it did not at this size; neither is a result on videos. All arms of a seed begin with the same "
    "network and the same noise, so intervals are over seeds of training, not over worlds."
)
Comparison = Mapping[str, Any]


def as_markdown(comparisons: Sequence[Comparison], commands: Sequence[str]) -> str:
    """Return the report of comparisons.

    Args:
        comparisons: of `results.read_results`; the first is the one that the summary is about.
        commands: that made their JSON, and this report.
    """
    parts = ["# Evidence: what the relational term does, and what does", summary(comparisons[0]), LIMITS]
    for data in comparisons:
        table = data["table"]
        for guidance in table["guidance"]:
            for budget in reversed(table["budgets"]):
                head = f"## {table['recipe']}, guidance {guidance:g}, {budget:,} student updates"
                parts += [head, main_table(data, guidance, budget), difference_table(data, guidance, budget)]
        head = f"## Cost on {table['name']}"
        parts += [head, cost_table(data)]
    parts += [
        "## What is claimed elsewhere",
        cited_table(),
        "## Made by",
        "\n".join(f"    {line}" for line in commands),
    ]
    return "\n\n".join(parts) + "\n"


def summary(data: Comparison) -> str:
    """Say what was found, null results included, in one paragraph."""
    table = data["table"]
    base, guidance, budget = table["baseline"], table["guidance"][0], table["budgets"][-1]
    updates = " and ".join(f"{number:,}" for number in table["budgets"])
    sentences = [
        f"In the world of recipe {table['recipe']}, whose teacher is exact, {len(table['arms'])} arms were compared "
        f"with {base} over {len(table['seeds'])} seeds at {updates} student updates; "
        f"after {budget:,}, with 95% t-intervals over seeds and Holm's correction over {len(table['metrics'])} metrics:"
    ]
    better, worse, null = list[str](), list[str](), list[str]()
    for arm, entry in table["arms"].items():
        if arm == base or entry.get("kind", "run") != "run":
            continue
        found = differences(data, arm, base, guidance, budget)
        gains = [name for name, gap in found.items() if gap.p_holm < ALPHA and gap.mean < 0]
        losses = [name for name, gap in found.items() if gap.p_holm < ALPHA and gap.mean > 0]
        if gains:
            better.append(f"{arm} ({', '.join(gains)})")
        if losses:
            worse.append(f"{arm} ({', '.join(losses)})")
        if not gains and not losses:
            null.append(arm)
    for words, names in (("better", better), ("worse", worse), ("no difference was found for", null)):
        sentences.append(f"{words}: {', '.join(names) or 'none'};")
    for metric, what in (("kept", "strong rank correlations"), ("tau_kept", "dependence of the tied factors")):
        kept = last_scores(data, base, guidance, budget, metric)
        verb = "overstates" if fmean(kept) > 1 else "loses"
        sentences.append(
            f"{base} {verb} the {what}: {fmean(kept):.3f} of the right ones (per seed "
            f"{', '.join(f'{value:.3f}' for value in kept)})."
        )
    return " ".join(sentences)


def main_table(data: Comparison, guidance: float, budget: int) -> str:
    """Return mean and standard deviation over seeds of all metrics, after the last step; * is p < .05 after Holm."""
    table = data["table"]
    metrics = (*table["metrics"], *(name for name in SIGNED if name not in table["metrics"]))
    rows = []
    for arm, entry in table["arms"].items():
        is_compared = arm != table["baseline"] and entry.get("kind", "run") == "run"
        gaps = differences(data, arm, table["baseline"], guidance, budget) if is_compared else {}
        cells = []
        for metric in metrics:
            values = last_scores(data, arm, guidance, budget, metric)
            mark = "*" if metric in gaps and gaps[metric].p_holm < ALPHA else ""
            cells.append(f"{fmean(values):.3f} ± {stdev(values):.3f}{mark}")
        rows.append([arm, *cells])
    return _markdown_table(["arm", *metrics], rows)


def difference_table(data: Comparison, guidance: float, budget: int) -> str:
    """Return paired differences with 95% intervals: each arm less the baseline, with its start less the baseline's."""
    table = data["table"]
    rows = []
    for arm, baseline in compared(table):
        gaps = differences(data, arm, baseline, guidance, budget)
        rows.append([f"{arm} - {baseline}", *(_interval(gaps[metric]) for metric in table["metrics"])])
    return _markdown_table(["difference [95% interval]", *table["metrics"]], rows)


def compared(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs of the report: every run with the baseline, and started runs with the started baseline too."""
    base = table["baseline"]
    runs = [arm for arm, entry in table["arms"].items() if entry.get("kind", "run") == "run" and arm != base]
    pairs = [(arm, base) for arm in runs]
    started = base + START_SUFFIX
    if started in table["arms"]:
        pairs += [(arm, started) for arm in runs if arm.endswith(START_SUFFIX) and arm != started]
    return pairs


def cost_table(data: Comparison) -> str:
    """Return counted updates and calls of each arm, the largest over seeds, and why they differ."""
    table, rows = data["table"], list[list[str]]()
    for arm, entry in table["arms"].items():
        for budget in table["budgets"]:
            cells = [cell for cell in data["cells"] if cell["arm"] == arm and cell["budget"] == budget]
            calls = {role: max(cell["calls"][role] for cell in cells) for role in ROLES}
            updates, seconds = max(cell["student_updates"] for cell in cells), fmean(cell["cpu_s"] for cell in cells)
            rows.append(
                [
                    arm,
                    f"{updates:,}",
                    *(f"{calls[role]:,}" for role in ROLES),
                    f"{seconds:.0f}",
                    entry.get("unequal", ""),
                ]
            )
    heads = ["arm", "student updates", *(f"{role} calls" for role in ROLES), "CPU s", "why unequal"]
    return _markdown_table(heads, rows)


def cited_table() -> str:
    """Return published VBench totals, as cited."""
    rows = [[entry.what, entry.size, f"{entry.total:.2f}", entry.source] for entry in CITED]
    listed = _markdown_table(["what", "size", "total", "by"], rows)
    return f"VBench totals as published; none is ours.\n\n{listed}\n\n{SPREAD_NOTE}"


def as_html(markdown: str, plots: Sequence[tuple[str, str]]) -> str:
    """Return the report as one file.

    Args:
        markdown: of `as_markdown`.
        plots: caption and SVG of each plot.
    """
    figures = "".join(
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for caption, svg in plots
    )
    blocks = [_html_block(block) for block in markdown.strip().split("\n\n")]
    # After title, summary and limits.
    body = "\n".join([*blocks[:3], figures, *blocks[3:]])
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-size:12px;display:block;overflow-x:auto}"
        "td,th{border-bottom:1px solid #ddd;padding:.2rem .5rem;text-align:right;white-space:nowrap}"
        "td:first-child,th:first-child{text-align:left}figure{margin:2rem 0}svg{max-width:100%;height:auto}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evidence</title><style>{style}</style>'
        f"<body>\n{body}\n</body></html>\n"
    )


def _html_block(block: str) -> str:
    lines = block.split("\n")
    if block.startswith("# "):
        return f"<h1>{html.escape(block[2:])}</h1>"
    if block.startswith("## "):
        return f"<h2>{html.escape(block[3:])}</h2>"
    if block.startswith("    "):
        return f"<pre>{html.escape(block)}</pre>"
    if block.startswith("| "):
        rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
        head = "".join(f"<th>{cell}</th>" for cell in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[2:])
        return f"<table><tr>{head}</tr>{body}</table>"
    return f"<p>{html.escape(block)}</p>"


def _interval(gap: Difference) -> str:
    mark = "*" if gap.p_holm < ALPHA else ""
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]{mark}"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
