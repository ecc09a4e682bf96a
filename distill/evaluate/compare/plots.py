"""The figures of the report that hold points and lines, drawn of the JSON alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from distill.evaluate.compare.findings import KEPT, lead
from distill.evaluate.compare.report import compared
from distill.evaluate.compare.results import Comparison, Setting, interval, scored_updates
from distill.evaluate.compare.roles import (
    BASELINE,
    CONTROL,
    LOSS,
    REGRESSED,
    TERM,
    Member,
    curve_arms,
    few_steps_of,
    floor_of,
    main_arms,
    members,
)
from distill.evaluate.compare.table import START

INK, FAINT, FLOOR = "#1b1f24", "#8b949e", "#117733"
# Hues that stay apart for colour-blind eyes (Tol, bright); one for a role, lighter for a second arm of it.
COLOURS = {
    BASELINE: ("#1b1f24",),
    TERM: ("#4477aa", "#66ccee", "#88bbdd", "#335577"),
    CONTROL: ("#999933", "#cccc66"),
    LOSS: ("#aa3377", "#cc88aa", "#882255", "#ddaacc"),
    REGRESSED: ("#bb5533",),
}
STARTED = ("#ee6677", "#ee9944", "#dd7788", "#cc9966")
COLUMNS = 3
LOG_ROOM = 2.0  # below the lowest line of a logarithmic panel, as a factor
CUT = 4.0  # medians; what is farther from 0 is an arrow with its number
LEAST_WIDTH = 8.5  # inches, of the legend
LEAST_SHARE = 0.5  # of the worlds, for an arm of the overview
SHOWN_STEPS = (*KEPT, "copying")


def overview(comparisons: Sequence[Comparison]) -> Figure:
    """Draw the errors of the main arms in the two leading metrics: a column for each world, a row for each metric."""
    places = [setting for own in comparisons for setting in own.last_settings]
    counts = Counter(arm for setting in places for arm in main_arms(setting.comparison.table))
    arms = [arm for arm, count in counts.items() if count >= LEAST_SHARE * len(places)]
    rows = max(len(lead(setting)) for setting in places)
    size = (max(2.0 + 2.35 * len(places), LEAST_WIDTH), 0.75 + rows * (0.55 + 0.2 * len(arms)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, len(places), squeeze=False, sharey=True)
    for column, setting in enumerate(places):
        for row, metric in enumerate(lead(setting)):
            panel = axes[row][column]
            _errors(panel, setting, arms, metric)
            panel.set_title(f"{setting.world}\n{metric}" if row == 0 else metric, fontsize=9)
    for panel in (panel for row in axes for panel in row if not panel.has_data()):
        panel.set_visible(False)
    handles = [
        Line2D([], [], color=INK, marker="o", linewidth=1.2, label="largest budget, 95% interval over seeds"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="white", linewidth=0, label="smaller budget"),
        Line2D([], [], color=FLOOR, linestyle="--", label="floor"),
        Line2D([], [], color=FAINT, linestyle=":", label="teacher in few steps"),
        Line2D([], [], color=INK, linewidth=0.8, label=f"{places[0].comparison.table['baseline']}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _errors(panel: Any, setting: Setting, arms: Sequence[str], metric: str) -> None:
    """Draw the mean of each arm with its interval, the smaller budgets hollow."""
    table = setting.comparison.table
    colours = {member.name: _hues(member)[0] for member in members(table)}
    smaller = [own for own in setting.comparison.settings if own.guidance == setting.guidance and own != setting]
    lowest = min(fmean(own.scores(arm, metric)) for own in (setting, *smaller) for arm in table["arms"])
    for place, arm in enumerate(arms):
        if arm not in table["arms"]:
            panel.text(
                0.02, place, "not run", fontsize=6, color=FAINT, va="center", transform=panel.get_yaxis_transform()
            )
            continue
        for own in smaller:
            mean = fmean(own.scores(arm, metric))
            panel.plot([mean], [place], marker="o", markersize=4, color=colours[arm], markerfacecolor="white")
        found = interval(setting.scores(arm, metric))
        low = max(found.low, lowest * 0.7) if lowest > 0 else found.low
        panel.plot([low, found.high], [place, place], color=colours[arm], linewidth=1.6, solid_capstyle="butt")
        panel.plot([found.mean], [place], marker="o", markersize=4.5, color=colours[arm])
    lines = [
        (table["baseline"], INK, "-", 0.8),
        (floor_of(table), FLOOR, "--", 1.2),
        (few_steps_of(table), FAINT, ":", 1.4),
    ]
    for arm, colour, style, width in lines:
        if arm:
            value = fmean(setting.scores(arm, metric))
            panel.axvline(value, color=colour, linestyle=style, linewidth=width, zorder=0)
    if lowest > 0:
        _log_axis(panel.xaxis, panel.set_xscale)
    panel.set_yticks(range(len(arms)), arms, fontsize=8)
    panel.set_ylim(len(arms) - 0.5, -0.5)
    _plain(panel)


def curves(comparison: Comparison, guidance: float) -> Figure:
    """Draw each metric over the updates of the student, with a ribbon from the lowest to the highest seed."""
    table, colours = comparison.table, colours_of(comparison)
    last = next(own for own in comparison.last_settings if own.guidance == guidance)
    arms = curve_arms(table)
    shown = [*table["metrics"], *(metric for metric in KEPT if last.has(metric))]
    figure, axes = _panels(shown, 2.5)
    for metric, panel in zip(shown, axes, strict=True):
        values = {}
        for arm in arms:
            updates = scored_updates(table, table["arms"][arm])
            values[arm] = [Setting(comparison, guidance, count).scores(arm, metric) for count in updates]
            means = [fmean(own) for own in values[arm]]
            panel.plot(updates, means, color=colours[arm], marker="o", markersize=2.5, linewidth=1.3)
            low, high = [min(own) for own in values[arm]], [max(own) for own in values[arm]]
            panel.fill_between(updates, low, high, color=colours[arm], alpha=0.18, linewidth=0)
        if metric in KEPT:
            panel.axhline(1.0, color=FLOOR, linestyle="--", linewidth=1.0)
        else:
            _references(panel, last, metric)
        if metric not in KEPT and min(score for own in values.values() for point in own for score in point) > 0:
            _log_axis(panel.yaxis, panel.set_yscale)
            # A seed that happens to be right by chance would take the axis down to 1e-6: the ribbon may leave it.
            lines = [value for line in panel.get_lines() for value in line.get_ydata() if value > 0]
            panel.set_ylim(bottom=max(panel.get_ylim()[0], min(lines) / LOG_ROOM))
        panel.set_title(f"{metric}, 1 is right" if metric in KEPT else metric, fontsize=9)
        panel.set_xlabel("student updates", fontsize=7)
        _plain(panel)
        panel.set_xscale("log")
        ticks = sorted({count for arm in arms for count in scored_updates(table, table["arms"][arm])})
        panel.set_xticks(ticks, [f"{count:,}" for count in ticks], fontsize=7)
        panel.xaxis.set_minor_locator(NullLocator())
    handles = [Line2D([], [], color=colours[arm], marker="o", markersize=3, label=arm) for arm in arms]
    handles += [
        Line2D([], [], color=colour, linestyle=style, label=arm) for arm, colour, style in _reference_arms(table)
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def steps(comparison: Comparison, guidance: float) -> Figure:
    """Draw each metric after every step of the sampler, at the largest budget."""
    table, colours = comparison.table, colours_of(comparison)
    last = next(own for own in comparison.last_settings if own.guidance == guidance)
    shown = [*table["metrics"], *(metric for metric in SHOWN_STEPS if last.has(metric))]
    arms = step_arms(table)
    figure, axes = _panels(shown, 2.5)
    for metric, panel in zip(shown, axes, strict=True):
        for arm in arms:
            count = len(last.cell(arm, table["seeds"][0])["steps"])
            means = [fmean(last.scores(arm, metric, step)) for step in range(count)]
            style = "-" if arm in curve_arms(table) else ":"
            panel.plot(range(1, count + 1), means, style, marker="o", markersize=2.5, color=colours[arm], linewidth=1.3)
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("step", fontsize=7)
        panel.xaxis.get_major_locator().set_params(integer=True)
        _plain(panel)
    handles = [Line2D([], [], color=colours[arm], marker="o", markersize=3, label=arm) for arm in arms]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def step_arms(table: Any) -> list[str]:
    """Return the arms that `steps` draws."""
    return [*curve_arms(table), *(arm for arm in (few_steps_of(table), _network(table)) if arm)]


def forest(setting: Setting) -> Figure:
    """Draw the paired differences of all runs from the baseline, one panel per metric."""
    table, colours = setting.comparison.table, colours_of(setting.comparison)
    pairs = [pair for pair in compared(table) if pair[1] == table["baseline"]]
    gaps = {arm: setting.differences(arm, base) for arm, base in pairs}
    figure, axes = _panels(table["metrics"], 0.8 + 0.19 * len(pairs))
    for metric, panel in zip(table["metrics"], axes, strict=True):
        own = {arm: gaps[arm][metric] for arm, _ in pairs}
        edge = CUT * median(max(abs(gap.low), abs(gap.high)) for gap in own.values()) or 1.0
        for place, (arm, gap) in enumerate(own.items()):
            colour = colours[arm]
            if abs(gap.mean) > edge:
                side = 1 if gap.mean > 0 else -1
                panel.plot([side * edge], [place], marker=">" if side > 0 else "<", markersize=4, color=colour)
                align = "right" if side > 0 else "left"
                panel.text(side * edge * 0.95, place, f"{gap.mean:+.2g}", fontsize=6, ha=align, va="center")
                continue
            panel.plot([gap.low, gap.high], [place, place], color=colour, linewidth=1.2)
            fill = colour if gap.verdict else "white"
            panel.plot([gap.mean], [place], marker="o", markersize=4, color=colour, markerfacecolor=fill)
        low, high = panel.get_xlim()
        panel.set_xlim(max(low, -1.05 * edge), min(high, 1.05 * edge))
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.axvline(0.0, color=FAINT, linewidth=0.8)
        panel.set_yticks(range(len(pairs)), [arm for arm, _ in pairs], fontsize=6.5)
        panel.set_ylim(len(pairs) - 0.5, -0.5)
        panel.set_title(metric, fontsize=9)
        _plain(panel)
    return figure


def colours_of(comparison: Comparison) -> dict[str, str]:
    """Return the colour of each arm: a hue for its role, the arms of `curves` apart from each other."""
    used, found = Counter[tuple[str, ...]](), dict[str, str]()
    roles = {member.name: member for member in members(comparison.table)}
    for name in dict.fromkeys((*curve_arms(comparison.table), *roles)):
        hues = _hues(roles[name])
        found[name] = hues[used[hues] % len(hues)]
        used[hues] += 1
    return found


def _hues(member: Member) -> tuple[str, ...]:
    return STARTED if member.is_started else COLOURS.get(member.role, (FAINT, "#c0c0c0"))


def _references(panel: Any, setting: Setting, metric: str) -> None:
    for arm, colour, style in _reference_arms(setting.comparison.table):
        panel.axhline(fmean(setting.scores(arm, metric)), color=colour, linestyle=style, linewidth=1.0, zorder=0)


def _reference_arms(table: Any) -> list[tuple[str, str, Any]]:
    fixed = [arm for arm, entry in table["arms"].items() if entry.get("updates")]
    found: list[tuple[str, str, Any]] = [
        (floor_of(table), FLOOR, "--"),
        (few_steps_of(table), FAINT, ":"),
        (_network(table), FAINT, "-."),
    ]
    return [own for own in found if own[0]] + [(arm, COLOURS[REGRESSED][0], "-") for arm in fixed[:1]]


def _network(table: Any) -> str:
    return next((arm for arm, entry in table["arms"].items() if entry.get("kind") == START), "")


def _log_axis(axis: Any, set_scale: Any) -> None:
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _plain(panel: Any) -> None:
    panel.tick_params(labelsize=7)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(visible=True, axis="both", color="#eceff2", linewidth=0.6)
    panel.set_axisbelow(True)


def _panels(names: Sequence[str], height: float) -> tuple[Figure, list[Any]]:
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3.3 * COLUMNS, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, COLUMNS, place) for place in range(1, len(names) + 1)]
