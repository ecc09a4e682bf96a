"""What a set of comparisons found, in sentences that are made of numbers; no result is typed in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distill.evaluate.compare.results import ALPHA, Comparison, Difference, Estimate, Setting, interval, share_closed
from distill.evaluate.compare.roles import LOSS, REGRESSED, TERM, control_pairs, floor_of, started, with_role
from distill.evaluate.stats import holm

Entry = TypeVar("Entry", bound=tuple[Any, ...])
KEPT = {"kept": "strong rank correlations", "tau_kept": "dependence of the tied factors"}
"""1 is right, below it dependence is lost, above it overstated."""
FEW_SEEDS = 3
LEADING = ("tau_err", "frame_rho")
SPELLED = {"dmd": "DMD"}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two arms in one setting; their differences are a family of Holm's correction."""

    setting: Setting
    arm: str
    other: str

    @property
    def name(self) -> str:
        """What sentences call it: its setting, its arm, and the other where that is not the baseline."""
        is_plain = self.other == self.setting.comparison.table["baseline"]
        return f"{self.arm if is_plain else f'{self.arm} - {self.other}'}, {self.setting.name}"

    @property
    def gaps(self) -> dict[str, Difference]:
        """Return arm - other in all tested metrics."""
        return self.setting.differences(self.arm, self.other)


@dataclass(frozen=True, slots=True)
class Tally:
    """The verdicts of the comparisons (pair and metric) that answer one question.

    Attributes:
        better, worse: metrics in which the first arm is so, after Holm over the metrics of a pair.
        total: number of comparisons.
        firm_better, firm_worse: how many stay so after Holm over all comparisons of the question.
    """

    better: tuple[str, ...]
    worse: tuple[str, ...]
    total: int
    firm_better: int
    firm_worse: int

    def __str__(self) -> str:
        undecided = self.total - len(self.better) - len(self.worse)
        return (
            f"better in {len(self.better)}{_counts(self.better)}, worse in {len(self.worse)}{_counts(self.worse)} and "
            f"undecided in {undecided} of {self.total} comparisons{self.firmly}"
        )

    @property
    def firmly(self) -> str:
        """How many verdicts hold over the whole question; empty without any."""
        if not self.better and not self.worse:
            return ""
        return f", {self.firm_better} and {self.firm_worse} after Holm over all {self.total}"

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether any comparison is firmly better, and any firmly worse."""
        return self.firm_better > 0, self.firm_worse > 0


def tally(pairs: Sequence[Pair]) -> Tally:
    """Count the verdicts of pairs over all tested metrics."""
    found = [(metric, gap) for pair in pairs for metric, gap in pair.gaps.items()]
    firm = [gap.mean for (_, gap), p in zip(found, holm([gap.p for _, gap in found]), strict=True) if p < ALPHA]
    return Tally(
        better=tuple(metric for metric, gap in found if gap.verdict < 0),
        worse=tuple(metric for metric, gap in found if gap.verdict > 0),
        total=len(found),
        firm_better=sum(mean < 0 for mean in firm),
        firm_worse=sum(mean > 0 for mean in firm),
    )


def first_paragraph(comparisons: Sequence[Comparison]) -> str:
    """Say in a few sentences what was found over all comparisons, null results included."""
    settings = [setting for own in comparisons for setting in own.settings]
    parts = [_preliminary(comparisons), _dependence(settings), _term(settings), _control(settings)]
    parts += [_start(settings), _losses(settings)]
    return " ".join(part for part in parts if part) or "Nothing was compared."


def details(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the counts and the extremes behind the first paragraph, one line for each question."""
    settings = [setting for own in comparisons for setting in own.settings]
    base = _baseline(settings)
    terms = sorted({pair.arm for pair in term_pairs(settings)})
    lines = [
        _detail(f"The relational term ({', '.join(terms)}) against {base}", term_pairs(settings)),
        _detail("The term against its controls", control_tests(settings)),
        _detail(f"The regressed start before {base}, against {base}", start_pairs(settings)),
        _detail("The term on top of the regressed start, against the start alone before DMD", _top_pairs(settings)),
    ]
    for name in dict.fromkeys(arm for setting in settings for arm in with_role(setting.comparison.table, LOSS)):
        lines.append(_detail(f"{name} against {base}", _loss_pairs(settings, name)))
    return [line for line in lines if line]


def method(comparisons: Sequence[Comparison]) -> str:
    """Say what was compared, and what a verdict means."""
    settings = [setting for own in comparisons for setting in own.settings]
    seeds = sorted({len(own.table["seeds"]) for own in comparisons})
    worlds = ", ".join(dict.fromkeys(setting.world for setting in settings))
    return (
        f"A setting is a world and a number of student updates (worlds: {worlds}). A comparison is one metric of two "
        f"arms in one setting, paired over {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds of "
        "training; brackets are 95% intervals over seeds. An arm is better or worse where p < "
        f"{ALPHA:g} after Holm's correction over the metrics of a pair in a setting, so one pair in twenty has such a "
        "verdict by chance; a difference holds where it stays after Holm over all comparisons of the question. The gap "
        "is from the baseline's error to the floor, the error of other samples of what students are to match: of the "
        "truth where the teacher is exact, else of the teacher in the most steps. Dependence is measured against the "
        "floor's own, which is 1."
    )


def _preliminary(comparisons: Sequence[Comparison]) -> str:
    """Warn of tables whose seeds are too few for any verdict to mean much."""
    few = [
        f"{own.table['name']} {len(own.table['seeds'])}" for own in comparisons if len(own.table["seeds"]) < FEW_SEEDS
    ]
    if not few:
        return ""
    return (
        f"Preliminary (seeds: {', '.join(few)}): intervals over so few seeds are wide, and differences that happen to "
        "be equal look certain."
    )


def _dependence(settings: Sequence[Setting]) -> str:
    """Answer whether the baseline loses dependence, with the extreme of each side."""
    found = [(estimate, metric, setting) for setting in settings for metric, estimate in kept(setting).items()]
    if not found:
        return ""
    lost, over = ([own for own in found if own[0].high < 1], [own for own in found if own[0].low > 1])
    count, base = len({own[2].name for own in found}), _baseline(settings)
    if not lost and not over:
        return f"**{base} neither loses nor overstates dependence in any of {count} settings.**"
    losing, overstating = ({own[2].name for own in entries} for entries in (lost, over))
    text = f"**{base} loses dependence in {len(losing)} and overstates it in {len(overstating)} of {count} settings**"
    both = f"both in {len(losing & overstating)}, by two measures; " if losing & overstating else ""
    ends = [_ends(entries)[place] for place, entries in ((0, lost), (1, over)) if entries]
    most = [f"{plain(end)} times the right {KEPT[metric]} in {setting.name}" for end, metric, setting in ends]
    return f"{text} ({both}at most {'; '.join(most)})."


def _term(settings: Sequence[Setting]) -> str:
    """Answer whether the relational term helps, in its published and corrected forms."""
    pairs = term_pairs(settings)
    if not pairs:
        return ""
    own, base = tally(pairs), _baseline(settings)
    forms = len({pair.arm for pair in pairs})
    verdict = {
        (False, False): "makes no difference that holds",
        (False, True): "does not help, and harms in places",
        (True, False): "helps in places",
        (True, True): "helps in places and harms in others",
    }[own.sides]
    text = (
        f"**The relational term ({forms} {'form' if forms == 1 else 'forms'}) {verdict}**: better than {base} in "
        f"{len(own.better)} and worse in {len(own.worse)} of {own.total} comparisons{own.firmly}"
    )
    metric = lead(settings[0])[0]
    shares = [own for own in _shares_of([(pair.setting, pair.arm) for pair in pairs]) if own[1] == metric]
    if not shares:
        return f"{text}; {extremes(pairs)}."
    ends = dict.fromkeys(f"{percent(end[0])} ({end[2]})" for end in _ends(shares))
    return f"{text}; it closes {' to '.join(ends)} of {base}'s gap to the floor in {metric}."


def _control(settings: Sequence[Setting]) -> str:
    """Answer whether the term does better than its size without its content."""
    pairs = control_tests(settings)
    if not pairs:
        return ""
    own = tally(pairs)
    verdict = {
        (False, False): "its content was not seen to matter",
        (False, True): "the control is better in places",
        (True, False): "its content matters in places",
        (True, True): "without one sign",
    }[own.sides]
    return (
        f"Against controls of the same size without its content, {verdict}: the term is better in {len(own.better)} "
        f"and worse in {len(own.worse)} of {own.total} comparisons{own.firmly}; {extremes(pairs)}."
    )


def _start(settings: Sequence[Setting]) -> str:
    """Answer which share of the gap a regressed start closes, alone and before the baseline."""
    base = _baseline(settings)
    alone = [(setting, arm) for setting in settings for arm in with_role(setting.comparison.table, REGRESSED)]
    before = [(pair.setting, pair.arm) for pair in start_pairs(settings)]
    parts = []
    for what, own in (("alone", alone), (f"before {base}", before)):
        shares = [entry for entry in _shares_of(own) if entry[1] == lead(settings[0])[0]]
        if shares:
            ends = _ends(shares)
            parts.append(f"{what} {' to '.join(dict.fromkeys(f'{percent(end[0])} ({end[2]})' for end in ends))}")
    if not alone and not before:
        return ""
    closes = f"closes {' and '.join(parts)} of the gap in {lead(settings[0])[0]}" if parts else "finds no gap to close"
    total = tally(start_pairs(settings))
    text = f"**A start regressed on the teacher's own paths** {closes}"
    if total.total:
        text += (
            f"; before {base} it is better than {base} alone in {len(total.better)} and worse in {len(total.worse)} of "
        )
        text += f"{total.total} comparisons{total.firmly}"
    return f"{text}."


def _losses(settings: Sequence[Setting]) -> str:
    """Say which other losses help."""
    names = dict.fromkeys(arm for setting in settings for arm in with_role(setting.comparison.table, LOSS))
    found = {name: tally(_loss_pairs(settings, name)) for name in names}
    groups = dict[str, list[str]]()
    for name, own in found.items():
        group = {
            (False, False): "no difference holds of",
            (False, True): "only losses hold of",
            (True, False): "only gains hold of",
            (True, True): "gains and losses hold of",
        }[own.sides]
        count = f"better in {len(own.better)}, worse in {len(own.worse)} of {own.total}{own.firmly}"
        groups.setdefault(group, []).append(f"{name} ({count})")
    parts = [f"{group} {', '.join(own)}" for group, own in groups.items()]
    return f"Of other losses, {'; '.join(parts)}." if parts else ""


def _detail(what: str, pairs: Sequence[Pair]) -> str:
    return f"{what}: {tally(pairs)}; {extremes(pairs)}." if pairs else ""


def term_pairs(settings: Sequence[Setting]) -> list[Pair]:
    """Return every form of the relational term with the baseline."""
    return [
        Pair(setting, arm, setting.comparison.table["baseline"])
        for setting in settings
        for arm in with_role(setting.comparison.table, TERM)
    ]


def control_tests(settings: Sequence[Setting]) -> list[Pair]:
    """Return the relational term with each of its fair controls."""
    return [Pair(setting, *names) for setting in settings for names in control_pairs(setting.comparison.table)]


def start_pairs(settings: Sequence[Setting]) -> list[Pair]:
    """Return the baseline with the regressed start and without."""
    pairs = [
        Pair(setting, started(setting.comparison.table["baseline"]), setting.comparison.table["baseline"])
        for setting in settings
    ]
    return [pair for pair in pairs if pair.arm in pair.setting.comparison.table["arms"]]


def _top_pairs(settings: Sequence[Setting]) -> list[Pair]:
    """Return every started form of the relational term with the started baseline."""
    return [
        Pair(setting, arm, started(setting.comparison.table["baseline"]))
        for setting in settings
        for arm in with_role(setting.comparison.table, TERM, is_started=True)
        if started(setting.comparison.table["baseline"]) in setting.comparison.table["arms"]
    ]


def _loss_pairs(settings: Sequence[Setting], name: str) -> list[Pair]:
    return [
        Pair(setting, name, setting.comparison.table["baseline"])
        for setting in settings
        if name in setting.comparison.table["arms"]
    ]


def lead(setting: Setting) -> list[str]:
    """Return the metrics that are quoted: those of dependence, where the table tests them, else its first."""
    metrics = list(setting.comparison.table["metrics"])
    return [metric for metric in LEADING if metric in metrics] or metrics[: len(LEADING)]


def kept(setting: Setting) -> dict[str, Estimate]:
    """Return how much dependence the baseline keeps, by each measure that the setting has.

    Other exact samples have not quite 1 either, so the floor's own is taken off, seed by seed: 1 is as much as these.
    """
    table = setting.comparison.table
    floor, found = floor_of(table), dict[str, Estimate]()
    for metric in KEPT:
        if setting.has(metric):
            own = setting.scores(table["baseline"], metric)
            least = setting.scores(floor, metric) if floor else [1.0] * len(own)
            found[metric] = interval([1.0 + value - other for value, other in zip(own, least, strict=True)])
    return found


def closed(setting: Setting, arm: str, metric: str) -> Estimate | None:
    """Return the share of the baseline's gap to the floor that an arm closes; None without floor or gap."""
    table = setting.comparison.table
    floor = floor_of(table)
    if not floor:
        return None
    return share_closed(*(setting.scores(own, metric) for own in (arm, table["baseline"], floor)))


def extremes(pairs: Sequence[Pair]) -> str:
    """Return the least and the largest difference in the first metric of the tables, with their settings."""
    found = [(pair.gaps[lead(pair.setting)[0]], pair) for pair in pairs]
    low, high = _ends(found)
    metrics = "/".join(dict.fromkeys(lead(pair.setting)[0] for pair in pairs))
    ends = [f"{signed(gap)} ({pair.name})" for gap, pair in (low, high)]
    return f"{metrics} differs by {' to '.join(dict.fromkeys(ends))}"


def plain(estimate: Estimate) -> str:
    """Return a number with its interval."""
    return f"{estimate.mean:z.3f} [{estimate.low:z.3f}, {estimate.high:z.3f}]"


def signed(estimate: Estimate) -> str:
    """Return a difference with its interval."""
    return f"{estimate.mean:+z.3f} [{estimate.low:+z.3f}, {estimate.high:+z.3f}]"


def percent(estimate: Estimate) -> str:
    """Return a share with its interval."""
    return f"{estimate.mean:z.0%} [{estimate.low:z.0%}, {estimate.high:z.0%}]"


def _shares_of(arms: Sequence[tuple[Setting, str]]) -> list[tuple[Estimate, str, str]]:
    """Return the share of the gap that each arm closes, its metric and its setting, where there is a gap."""
    return [
        (share, metric, setting.name)
        for setting, arm in arms
        for metric in lead(setting)
        if (share := closed(setting, arm, metric)) is not None
    ]


def _ends(found: Sequence[Entry]) -> tuple[Entry, Entry]:
    """Return the least and the largest of entries that begin with an estimate."""
    return min(found, key=_shown), max(found, key=_shown)


def _shown(entry: tuple[Any, ...]) -> float:
    """Return the mean of an estimate as it is shown, so that of what looks equal the first is named."""
    return round(float(entry[0].mean), 2)


def _counts(metrics: Sequence[str]) -> str:
    counts = Counter(metrics)
    return f" ({', '.join(f'{metric} {count}' for metric, count in counts.most_common())})" if counts else ""


def _baseline(settings: Sequence[Setting]) -> str:
    names = dict.fromkeys(str(setting.comparison.table["baseline"]) for setting in settings)
    return "/".join(SPELLED.get(name, name) for name in names)
