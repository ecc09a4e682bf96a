"""The report of comparisons as Markdown, made of their JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from distill.evaluate.compare.claims import claims
from distill.evaluate.compare.findings import (
    KEPT,
    closed,
    details,
    first_paragraph,
    kept,
    lead,
    method,
    percent,
    plain,
    signed,
)
from distill.evaluate.compare.markdown import table
from distill.evaluate.compare.results import ROLES, Comparison, Setting, interval
from distill.evaluate.compare.roles import control_pairs, floor_of, is_exact, is_run, main_arms, started
from distill.evaluate.compare.rule import TEXTS, Pick, picks, recommendation

TITLE = "Evidence: does the relational term restore dependence, and what does?"
# Shown beside the tested metrics where every cell has them, and never tested.
SHOWN = (*KEPT, "sd_ratio", "form_err", "imaging_err", "bend_err", "copying")
EXACT_LIMITS = (
    "A world whose teacher is exact is a Gaussian mixture of 128 dimensions, and its networks are MLPs of 194,000 "
    "parameters that share nothing over frames; regression blurs in high dimensions, so that a start which suffices "
    "there need not suffice elsewhere."
)
SHAPE_LIMITS = (
    "ShapeWorld has videos of flat shapes, its teacher is a small Wan trained for minutes, and detectors measure what "
    "is in a clip."
)
LIMITS = (
    "A difference says that a method can do something, a null result that it did not at this size; neither is a result "
    "on videos of a large model. All arms of a seed begin with the same network and the same noise: intervals are over "
    "seeds of training, not over worlds."
)
METRICS = {
    "tau_err": "Kendall's tau of the tied factors",
    "frame_rho": "rank correlations between frames",
    "kept_err": "strong correlations over the reference's, their distance from 1",
    "kept": "the same with its side: below 1 dependence is lost, above it overstated",
    "tau_kept": "the same of the tied factors alone",
    "w1": "margins: Wasserstein distance in standard deviations",
    "sd_ratio": "ratio of spreads, 1 is right",
    "energy": "joint law along the main directions, a proper score",
    "mode_tv": "total variation of the modes",
    "mode_miss": "mass of modes that are lost",
    "copying": "correlation with what the teacher makes of the same noise; none is right",
    "wrong_new": "captions not followed: new captions of trained combinations",
    "wrong_held_out": "captions not followed: combinations held out",
    "wrong_far": "captions not followed: the farthest combinations, out of distribution",
    "bend_err": "missing variety of the paths' bend",
    "imaging_err": "imaging quality short of 1",
    "form_err": "shapes short of their ideal form",
}
"""What each score of a table asks; a name with _truth is the same against the truth, not against the teacher's law."""
README_BEGIN, README_END = "<!-- evidence: codmd-distill eval compare report --insert -->", "<!-- end of evidence -->"


def as_markdown(comparisons: Sequence[Comparison], commands: Sequence[str], figures: Mapping[str, str]) -> str:
    """Return the report.

    Args:
        comparisons: of `results.read_results`.
        commands: that made their JSON, and this report.
        figures: the Markdown of each figure, by its key: overview, and PLACE-curves and so on of each place.
    """
    parts = [f"# {TITLE}", first_paragraph(comparisons), limits(comparisons), *_figures(figures, "overview")]
    parts += [method(comparisons), glossary(comparisons), "\n".join(f"- {line}" for line in details(comparisons))]
    parts += ["## World by world", *answers(comparisons)]
    for own in comparisons:
        parts += _world(own, figures)
    parts += _rule(comparisons)
    parts += ["## What is claimed elsewhere", claims(), "## All differences"]
    for own in comparisons:
        for setting in reversed(own.settings):
            parts += [f"### {setting.name}: differences", difference_table(setting)]
        for setting in own.last_settings:
            parts += _figures(figures, f"{setting.place}-forest")
    parts += ["## Calls of each arm"]
    for own in comparisons:
        parts += [f"### Cost on {own.table['name']}", cost_table(own)]
    parts += ["## Made by", "\n".join(["```bash", *commands, "```"])]
    return "\n\n".join(parts) + "\n"


def limits(comparisons: Sequence[Comparison]) -> str:
    """Say what the worlds of these comparisons cannot show."""
    kinds = {is_exact(own.table) for own in comparisons}
    parts = [LIMITS, *([EXACT_LIMITS] if True in kinds else []), *([SHAPE_LIMITS] if False in kinds else [])]
    return f"**What this does not show.** {' '.join(parts)}"


def glossary(comparisons: Sequence[Comparison]) -> str:
    """Return what the scores of these tables ask."""
    names = dict.fromkeys(name for own in comparisons for setting in own.last_settings for name in _columns(setting))
    known = [f"`{name}`: {METRICS[name]}" for name in names if name in METRICS]
    truth = ["a name with `_truth`: against the truth, and not against what the teacher makes"]
    return f"Scores: {'; '.join(known + truth * any(name.endswith('_truth') for name in names))}."


def readme_block(comparisons: Sequence[Comparison], figure: str, page: str) -> str:
    """Return what README says of the evidence, markers included.

    Args:
        comparisons: as `as_markdown`.
        figure, page: of the report, relative to README.
    """
    sentence = recommendation(comparisons) or "No table of these has a rule that picks what to train."
    names = ", ".join(str(own.table["name"]) for own in comparisons)
    return (
        f"{README_BEGIN}\n![Errors of the arms in {names}, with 95% intervals over seeds]({figure})\n\n"
        f"{sentence} [What was found, what it does not show, every number]({page}).\n{README_END}"
    )


def replace_block(text: str, block: str) -> str | None:
    """Return text with its block replaced; None where it has no block."""
    before, begin, rest = text.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    return f"{before}{block}{after}" if begin and end else None


def answers(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the questions of the first paragraph for each setting: dependence kept, and shares of the gap closed."""
    settings = [setting for own in comparisons for setting in own.settings]
    measures = [metric for metric in KEPT if any(metric in kept(setting) for setting in settings)]
    rows = []
    for setting in settings:
        base, floor, metric = setting.comparison.table["baseline"], floor_of(setting.comparison.table), lead(setting)[0]
        found, own = kept(setting), plain(interval(setting.scores(base, metric)))
        least = f"{fmean(setting.scores(floor, metric)):.3f}" if floor else ""
        rows.append(
            [
                setting.name,
                *(plain(found[measure]) if measure in found else "" for measure in measures),
                f"{metric} {own}",
                least,
            ]
        )
    heads = ["the baseline", *(f"keeps of the {KEPT[measure]}" for measure in measures), "error", "floor"]
    parts = [
        "Does the baseline lose dependence? 1 is as much as the floor has, below it dependence is lost, above it "
        "overstated."
    ]
    parts.append(table(heads, rows))
    for place in range(max(len(lead(setting)) for setting in settings)):
        parts += [_share_table(settings, place)]
    return [
        parts[0],
        parts[1],
        "Which share of the baseline's gap to the floor does an arm close (Fieller's 95% interval over seeds)? 100% is "
        "the error of the floor, 0% the baseline's, below it the arm is worse; - where there is no gap that the "
        "seeds can tell from 0. The metric stands in the corner.",
        *parts[2:],
    ]


def main_table(setting: Setting) -> str:
    """Return every arm's mean and 95% t-interval; bold is better than the baseline, italic worse, after Holm."""
    own = setting.comparison.table
    metrics = _columns(setting)
    rows = []
    for arm, entry in own["arms"].items():
        is_compared = arm != own["baseline"] and is_run(entry)
        gaps = setting.differences(arm, own["baseline"]) if is_compared else {}
        cells = []
        for metric in metrics:
            found = interval(setting.scores(arm, metric))
            text = f"{found.mean:z.3f} ± {found.high - found.mean:.3f}"
            verdict = gaps[metric].verdict if metric in gaps else 0
            cells.append({-1: f"**{text}**", 0: text, 1: f"_{text}_"}[verdict])
        rows.append([arm, *cells])
    return table(["arm", *metrics], rows)


def _columns(setting: Setting) -> list[str]:
    """Return what the main table of a setting shows, the tested metrics first."""
    tested = setting.comparison.table["metrics"]
    return [*tested, *(name for name in SHOWN if name not in tested and setting.has(name))]


def difference_table(setting: Setting) -> str:
    """Return paired differences with 95% intervals; * is p < .05 after Holm over the metrics."""
    rows = []
    for arm, other in compared(setting.comparison.table):
        gaps = setting.differences(arm, other)
        cells = [f"{signed(gap)}{'*' if gap.verdict else ''}" for gap in gaps.values()]
        rows.append([f"{arm} - {other}", *cells])
    return table(["difference [95% interval]", *setting.comparison.table["metrics"]], rows)


def compared(own: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs of the report: every run with the baseline, and started runs with the started baseline too."""
    base = own["baseline"]
    runs = [arm for arm, entry in own["arms"].items() if is_run(entry) and arm != base]
    pairs = [(arm, base) for arm in runs]
    if started(base) in own["arms"]:
        pairs += [(arm, started(base)) for arm in runs if arm.endswith(started("")) and arm != started(base)]
    return [*pairs, *(pair for pair in control_pairs(own))]


def cost_table(own: Comparison) -> str:
    """Return counted updates and calls of each arm at each budget, the largest over seeds, and why they differ."""
    rows = list[list[str]]()
    for arm, entry in own.table["arms"].items():
        if not is_run(entry):
            continue
        for setting in own.settings:
            cells = [setting.cell(arm, seed) for seed in own.table["seeds"]]
            calls, updates = setting.calls(arm), max(cell["student_updates"] for cell in cells)
            counted = [f"{calls[role]:,}" for role in ROLES]
            rows.append(
                [arm, setting.name, f"{updates:,}", *counted, f"{setting.cpu_s(arm):.0f}", entry.get("unequal", "")]
            )
    heads = ["arm", "setting", "student updates", *(f"{role} calls" for role in ROLES), "CPU s", "why unequal"]
    return table(heads, rows)


def _world(own: Comparison, figures: Mapping[str, str]) -> list[str]:
    """Return the sections of a table, one for each guidance: what was run, its figures, its main tables."""
    parts = []
    entry = own.table
    for last in own.last_settings:
        seeds, base = ", ".join(map(str, entry["seeds"])), entry["baseline"]
        parts += [
            f"## {last.world}",
            f"Table `{entry['name']}`: {len(entry['arms'])} arms, seeds {seeds}, {entry.get('samples', 0):,} samples "
            "of each caption. Every tested metric is an error, 0 when right. Mean ± half of the 95% t-interval over "
            f"seeds, after the last step; bold is better than {base}, italic worse, p < .05 after Holm over "
            f"{len(entry['metrics'])} metrics.",
        ]
        for kind in ("clips", "curves", "matrices", "steps"):
            parts += _figures(figures, f"{last.place}-{kind}")
        for setting in reversed([found for found in own.settings if found.guidance == last.guidance]):
            parts += [f"### {setting.name}: every arm", main_table(setting)]
    return parts


def _share_table(settings: Sequence[Setting], place: int) -> str:
    columns = [(setting, lead(setting)[place]) for setting in settings if len(lead(setting)) > place]
    arms = dict.fromkeys(arm for setting, _ in columns for arm in main_arms(setting.comparison.table))
    rows = []
    for arm in arms:
        cells = []
        for setting, metric in columns:
            share = closed(setting, arm, metric) if arm in setting.comparison.table["arms"] else None
            cells.append(percent(share) if share is not None else "-")
        if arm not in {setting.comparison.table["baseline"] for setting, _ in columns}:
            rows.append([arm, *cells])
    metrics = "/".join(dict.fromkeys(metric for _, metric in columns))
    return table([metrics, *(setting.name for setting, _ in columns)], rows)


def _rule(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the rule, what it picks in each setting, and what we would train."""
    found = picks(comparisons)
    if not found:
        return []
    names = dict.fromkeys(str(own.setting.comparison.table["rule"]) for own in found)
    texts = [f"Rule `{name}`, written before the runs. {TEXTS[name]}" for name in names]
    heads = ["setting", "pick", "its cost", "leader", "its cost", "no candidates, worse than the baseline in"]
    rows = [
        [own.setting.name, own.winner, _cost(own, own.winner), own.leader, _cost(own, own.leader), _lost(own)]
        for own in found
    ]
    return ["## What we would train", recommendation(comparisons), *texts, table(heads, rows)]


def _cost(own: Pick, arm: str) -> str:
    cost = own.costs[arm]
    return f"{cost / 1e6:.2f} million samples" if cost >= 1e5 else f"{cost:,.0f} samples"


def _lost(own: Pick) -> str:
    return "; ".join(f"{arm}: {', '.join(metrics)}" for arm, metrics in own.lost.items())


def _figures(figures: Mapping[str, str], key: str) -> list[str]:
    return [figures[key]] if key in figures else []
