"""The rule that picks the student to train and ship, written before any run of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from distill.evaluate.compare.findings import closed, lead, percent
from distill.evaluate.compare.results import Comparison, Setting
from distill.evaluate.compare.roles import CONTROL, REFERENCE, is_exact, members
from distill.evaluate.compare.table import NO_LOSS

TEXTS = {
    NO_LOSS: (
        "In a table, at its largest budget: (1) a candidate is a trained arm that is no control and that is worse than "
        "the baseline in no tested metric (paired t-test over seeds, p < .05 after Holm over the metrics). (2) The "
        "leader is the candidate with the lowest mean rank over the tested metrics. (3) The pick is the cheapest "
        "candidate that the leader beats in no tested metric by the same test; cost is the number of samples that "
        "student, critic and teacher are evaluated on, start included; of equal cost, the first in the table. So what "
        "the seeds cannot tell apart is decided by cost. (4) Among tables, ShapeWorld's decides what is shipped, "
        "because it is the world of the shipped student; without it, the arm picked in most settings, then the "
        "cheaper one. (5) If the shipped student is not CoDMD's, CoDMD's is shipped beside it and the README says "
        "which one is served."
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """What the rule says of one setting.

    Attributes:
        setting: its largest budget.
        winner: the arm that is picked.
        leader: the candidate with the lowest mean rank.
        ranks: mean rank of each candidate, the lower the better.
        costs: evaluated samples of each candidate.
        lost: the metrics in which an arm is worse than the baseline, for those that are no candidates.
    """

    setting: Setting
    winner: str
    leader: str
    ranks: dict[str, float]
    costs: dict[str, int]
    lost: dict[str, list[str]]


def pick(setting: Setting) -> Pick:
    """Apply the rule to one setting."""
    table = setting.comparison.table
    base, metrics = table["baseline"], table["metrics"]
    lost: dict[str, list[str]] = {}
    candidates = []
    for member in members(table):
        if member.role in (REFERENCE, CONTROL):
            continue
        gaps = setting.differences(member.name, base) if member.name != base else {}
        worse = [metric for metric, gap in gaps.items() if gap.verdict > 0]
        if worse:
            lost[member.name] = worse
        else:
            candidates.append(member.name)
    means = {arm: [fmean(setting.scores(arm, metric)) for metric in metrics] for arm in candidates}
    ranks = {arm: fmean(_rank(means, arm, place) for place in range(len(metrics))) for arm in candidates}
    leader = min(candidates, key=lambda arm: ranks[arm])
    costs = {arm: sum(setting.calls(arm).values()) for arm in candidates}
    equals = [arm for arm in candidates if arm == leader or not _beats(setting, leader, arm)]
    winner = min(equals, key=lambda arm: costs[arm])
    return Pick(setting=setting, winner=winner, leader=leader, ranks=ranks, costs=costs, lost=lost)


def picks(comparisons: Sequence[Comparison]) -> list[Pick]:
    """Apply the rule to all comparisons whose table has it."""
    return [pick(setting) for own in comparisons if own.table.get("rule") in TEXTS for setting in own.last_settings]


def recommended(found: Sequence[Pick]) -> str:
    """Return the arm that the rule picks over all tables, see (4); empty without a table that has the rule."""
    deciding = [own for own in found if not is_exact(own.setting.comparison.table)] or found
    wins = [own.winner for own in deciding]
    costs = {own.winner: own.costs[own.winner] for own in deciding}
    return max(wins, key=lambda arm: (wins.count(arm), -costs[arm]), default="")


def recommendation(comparisons: Sequence[Comparison]) -> str:
    """Say in one sentence what we would train and why; empty where no table has a rule."""
    found = picks(comparisons)
    arm = recommended(found)
    if not arm:
        return ""
    own = [entry for entry in found if entry.winner == arm]
    base = own[0].setting.comparison.table["baseline"]
    seeds = sorted({len(entry.setting.comparison.table["seeds"]) for entry in found})
    count = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    text = f"We would train **{arm}**: the rule written before the runs picks {_by_world(found, arm)} ({count} seeds)"
    deciding = [entry.setting.world for entry in own if not is_exact(entry.setting.comparison.table)]
    if deciding and len(found) > len(deciding):
        text += f", and {' and '.join(deciding)} decides"
    losses = [f"in {entry.setting.world} ({', '.join(entry.lost[arm])})" for entry in found if arm in entry.lost]
    end = f". It is worse than {base} {' and '.join(losses)}." if losses else "."
    if all(is_exact(entry.setting.comparison.table) for entry in found):
        end += " These worlds have an exact teacher and no videos: ShapeWorld's table decides."
    # Exact worlds that disagree are decided by cost.
    rivals = [entry.winner for entry in found] if not deciding else []
    is_tied = any(rivals.count(other) == rivals.count(arm) for other in rivals if other != arm)
    tie = "it is the cheapest of those picked equally often and " if is_tied else ""
    shares = [
        (share, entry.setting.world, metric)
        for entry in own
        for metric in lead(entry.setting)[:1]
        if arm != base and (share := closed(entry.setting, arm, metric)) is not None and share.low > 0
    ]
    if not shares:
        # No share of the gap that the seeds can tell from 0.
        gaps = [gap for entry in own if arm != base for gap in entry.setting.differences(arm, base).values()]
        better = sum(gap.verdict < 0 for gap in gaps)
        there = f" in {' and '.join(entry.setting.world for entry in own)}" if len(own) < len(found) else ""
        reason = f"it is better than {base} in {better} of {len(gaps)} comparisons and " if better else ""
        return f"{text}, because {tie}{reason}no candidate that costs more was shown to be better{there}{end}"
    ends = [extreme(shares, key=lambda entry: round(entry[0].mean, 2)) for extreme in (min, max)]
    between = " to ".join(dict.fromkeys(f"{percent(share)} ({world})" for share, world, _ in ends))
    gap = f"the gap in {'/'.join(dict.fromkeys(metric for *_, metric in shares))} between {base} and the floor"
    reason = f"it closes {between} of {gap} and no candidate that costs more was shown to be better"
    return f"{text}, because {tie}{reason}{end}"


def _by_world(found: Sequence[Pick], arm: str) -> str:
    """Say which arm is picked in which worlds, that of the sentence first."""
    worlds: dict[str, list[str]] = {arm: []}
    for entry in found:
        worlds.setdefault(entry.winner, []).append(entry.setting.world)
    named = [f"{'it' if name == arm else name} in {' and '.join(own)}" for name, own in worlds.items()]
    return " and ".join([", ".join(named[:-1]), named[-1]]) if len(named) > 1 else named[0]


def _rank(means: dict[str, list[float]], arm: str, place: int) -> float:
    """Return the rank of an arm in one metric, 1 is the lowest error; equal errors share their mean rank."""
    own = means[arm][place]
    below = sum(other[place] < own for other in means.values())
    equal = sum(other[place] == own for other in means.values())
    return below + (equal + 1) / 2


def _beats(setting: Setting, leader: str, arm: str) -> bool:
    return any(gap.verdict < 0 for gap in setting.differences(leader, arm).values())
