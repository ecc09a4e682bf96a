"""What each arm of a comparison is there for, read off its table; knows no scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.evaluate.compare.table import RUN, START_SUFFIX, TEACHER, TRUTH

BASELINE, TERM, CONTROL, REGRESSED, LOSS, REFERENCE = "baseline", "term", "control", "regressed", "loss", "reference"
# Any other method is a rival loss.
ROLE_OF_METHOD = {"codmd": TERM, "regression": REGRESSED}
EXACT_PREFIX = "analytic_"
CONTROL_KEY = "copula.control"
# Its target never vanishes, so that it does badly proves nothing.
UNFAIR_CONTROL = "teacher_only"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """An arm and its part in the comparison.

    Attributes:
        name: of the arm.
        role: baseline, term (the relational term, published or corrected), control (the term without its content),
            regressed (the regressed start alone), loss (any other trained arm), reference (trains nothing).
        control: which one, for a control.
        is_started: it begins with the regressed start.
        partner: of a control, the arm whose term it takes the content from; empty where the table has none.
    """

    name: str
    role: str
    control: str = ""
    is_started: bool = False
    partner: str = ""


def members(table: Mapping[str, Any]) -> list[Member]:
    """Return the arms of a table in its order."""
    arms = table["arms"]
    return [_member(name, entry, table, arms) for name, entry in arms.items()]


def with_role(table: Mapping[str, Any], role: str, *, is_started: bool = False) -> list[str]:
    """Return the names of the arms of a role; of controls, the fair ones."""
    return [
        member.name
        for member in members(table)
        if member.role == role and member.is_started == is_started and member.control != UNFAIR_CONTROL
    ]


def control_pairs(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each term with its fair controls: the same settings without the content."""
    return [
        (member.partner, member.name)
        for member in members(table)
        if member.role == CONTROL and member.partner and member.control != UNFAIR_CONTROL
    ]


def main_arms(table: Mapping[str, Any]) -> list[str]:
    """Return the trained arms that the questions of the report are about, baseline first."""
    started_arms = {member.name for member in members(table) if member.is_started}
    tested = dict.fromkeys(term for term, _ in control_pairs(table))
    own = [table["baseline"], *with_role(table, TERM), *with_role(table, CONTROL), *with_role(table, LOSS)]
    own += with_role(table, REGRESSED)
    return own + [name for name in (started(table["baseline"]), *map(started, tested)) if name in started_arms]


def curve_arms(table: Mapping[str, Any]) -> list[str]:
    """Return the few arms that a plot of lines can hold: of each role one or two."""
    terms, controls = with_role(table, TERM), control_pairs(table)[:1]
    chosen = {table["baseline"], *terms[:1], *(name for pair in controls for name in pair)}
    chosen |= {started(name) for name in (table["baseline"], *(pair[0] for pair in controls))}
    chosen |= set(with_role(table, LOSS)[:2])
    return [name for name in main_arms(table) if name in chosen]


def truth_of(table: Mapping[str, Any]) -> str:
    """Return the arm that is the truth itself; empty where the table has none."""
    return next((name for name, entry in table["arms"].items() if entry.get("kind") == TRUTH), "")


def is_exact(table: Mapping[str, Any]) -> bool:
    """Return whether the teacher of a table's world is the truth, in closed form."""
    return str(table["recipe"]).startswith(EXACT_PREFIX)


def floor_of(table: Mapping[str, Any]) -> str:
    """Return the arm with the least error that a score can show: other samples of what students are to match.

    That is the truth where the teacher is exact (guided, where the table is), and else the teacher in the most steps.
    Empty where the table has no such arm.
    """
    steps = _teachers(table)
    return truth_of(table) if is_exact(table) else max(steps, key=lambda name: steps[name], default="")


def few_steps_of(table: Mapping[str, Any]) -> str:
    """Return the teacher in the fewest steps; empty where the table has none."""
    steps = _teachers(table)
    return min(steps, key=lambda name: steps[name], default="")


def started(name: str) -> str:
    """Return the name of an arm with the regressed start."""
    return name + START_SUFFIX


def is_run(entry: Mapping[str, Any]) -> bool:
    """Return whether an arm trains."""
    return bool(entry.get("kind", RUN) == RUN)


def _teachers(table: Mapping[str, Any]) -> dict[str, int]:
    return {name: entry["steps"] for name, entry in table["arms"].items() if entry.get("kind") == TEACHER}


def _member(name: str, entry: Mapping[str, Any], table: Mapping[str, Any], arms: Mapping[str, Any]) -> Member:
    if not is_run(entry):
        return Member(name=name, role=REFERENCE)
    is_started, control = name.endswith(START_SUFFIX), _settings(entry).get(CONTROL_KEY, "")
    if name.removesuffix(START_SUFFIX) == table["baseline"]:
        return Member(name=name, role=BASELINE, is_started=is_started)
    role = ROLE_OF_METHOD.get(entry["method"], LOSS)
    if role != TERM or not control:
        return Member(name=name, role=role, is_started=is_started)
    wanted = {key: value for key, value in _settings(entry).items() if key != CONTROL_KEY}
    partners = [
        other
        for other, own in arms.items()
        if is_run(own)
        and own["method"] == entry["method"]
        and _settings(own) == wanted
        and other.endswith(START_SUFFIX) == is_started
    ]
    return Member(name=name, role=CONTROL, control=control, is_started=is_started, partner="".join(partners[:1]))


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    return dict(entry.get("settings", {}))
