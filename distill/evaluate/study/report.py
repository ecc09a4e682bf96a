"""Writes what a study says: a Markdown report, votes.csv, analysis.json. The first line tells who the raters were."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

from distill.evaluate.study.design import Study
from distill.evaluate.study.session import AUTOMATED, HUMAN, REHEARSAL, SIMULATED
from distill.evaluate.study.votes import Rater, arm_of, has_failed

CSV_FIELDS = (
    "study", "rater", "kind", "has_failed", "trial", "item", "prompt", "left", "right", "question", "answer",
    "preferred", "catch", "repeat_of", "plays_left", "plays_right", "shown_s", "time_s", "note",
)  # fmt: skip
KINDS = {
    HUMAN: "human",
    AUTOMATED: "automated (a program steered the browser)",
    REHEARSAL: "rehearsing",
    SIMULATED: "SIMULATED",
}


def choose_raters(raters: Sequence[Rater]) -> tuple[str, list[Rater]]:
    """Return the kind of raters that is analysed, and those raters: humans, or where there are none, anybody.

    Kinds are never mixed.
    """
    present = Counter(rater.kind for rater in raters if rater.votes)
    kind = HUMAN if present[HUMAN] else max(present, key=lambda name: present[name], default=HUMAN)
    return kind, [rater for rater in raters if rater.kind == kind]


def headline(kind: str, raters: Sequence[Rater], everybody: Sequence[Rater]) -> str:
    """Return the first line of a report: whether the raters were human."""
    num = sum(bool(rater.votes) for rater in raters)
    left_out = Counter(rater.kind for rater in everybody if rater.votes and rater.kind != kind)
    rest = ", ".join(f"{count} {KINDS.get(name, name)}" for name, count in sorted(left_out.items()))
    more = f" Left out: {rest}." if rest else ""
    if num == 0:
        return "No rater has answered yet: there is no result."
    if kind == HUMAN:
        return f"Raters: {num} human.{more}"
    return f"No human raters: {num} {KINDS.get(kind, kind)}. This tests the tool and is not a result.{more}"


def as_markdown(first_line: str, numbers: dict[str, Any]) -> str:
    """Return the report."""
    lines = [first_line, ""]
    failed = [row for row in numbers["raters"] if row["has_failed"]]
    unchecked = [row for row in numbers["raters"] if row["num_answered"] and not row["catches"][1]]
    passed, everybody = numbers["passed"], numbers["all"]
    lines += [
        f"{numbers['num_items']} pairs of videos on {numbers['num_prompts']} prompts; "
        f"{passed['num_votes']} answered pairs of {passed['num_raters']} raters count. "
        f"{len(failed)} raters failed the catch trials and are left out; {len(unchecked)} answered none yet.",
        "",
        *_pair_table(passed),
    ]
    if failed:
        lines += ["", f"With the {len(failed)} who failed the catch trials:", "", *_pair_table(everybody)]
    lines += ["", *_strength_table(numbers["arms"], passed), "", *_check_table(passed), ""]
    lines += [
        "Win rates count same and both bad as half. Intervals are 95 %, from a bootstrap over raters and prompts. "
        "undecided: the interval covers 50 %. overall is the main question; no correction is made for asking several.",
        "",
    ]
    return "\n".join(lines)


def _pair_table(group: dict[str, Any]) -> list[str]:
    lines = [
        "| question | first | second | votes | first | same | both bad | second | win rate of first | preferred |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in group["pairs"]:
        shares = " | ".join(f"{100 * row['shares'][name]:.0f} %" for name in ("first", "same", "bad", "second"))
        lines.append(
            f"| {row['question']} | {_cell(row['first'])} | {_cell(row['second'])} | {row['num_votes']} | {shares} | "
            f"{_percent(row['win_rate'])} | {_cell(row['verdict'])} |"
        )
    return lines if group["pairs"] else ["No pair was answered."]


def _strength_table(arms: list[str], group: dict[str, Any]) -> list[str]:
    if not group["strengths"]:
        return []
    lines = [
        "Bradley-Terry strengths in logits, mean zero:",
        "",
        f"| question | {' | '.join(_cell(arm) for arm in arms)} |",
        f"|---|{'---|' * len(arms)}",
    ]
    for question, strengths in group["strengths"].items():
        lines.append(f"| {question} | {' | '.join(_logit(strengths[arm]) for arm in arms)} |")
    return lines


def _check_table(group: dict[str, Any]) -> list[str]:
    lines = [
        "| question | share left of decided | side bias | repeats answered the same | Krippendorff's alpha |",
        "|---|---|---|---|---|",
    ]
    for question, retest in group["retest"].items():
        bias = group["side_bias"].get(question, {})
        left = _percent(bias["share_left"]) if bias.get("share_left") else "-"
        share, count = retest["share_same"], retest["num_repeats"]
        same = "-" if share is None else f"{100 * share:.0f} % of {count}"
        alpha = group["agreement"][question]
        agreed = "-" if alpha is None else f"{alpha:.2f}"
        lines.append(f"| {question} | {left} | {bias.get('verdict', '-')} | {same} | {agreed} |")
    return lines


def planted_table(numbers: dict[str, Any], planted: dict[tuple[str, str], float]) -> list[str]:
    """Return the lines of a report that set planted win rates beside what the analysis found."""
    lines = ["| question | pair | planted | found | inside |", "|---|---|---|---|---|"]
    for row in numbers["passed"]["pairs"]:
        truth = planted[row["first"], row["second"]]
        found = row["win_rate"]
        is_inside = found["low"] is not None and found["low"] <= truth <= found["high"]
        pair = f"{_cell(row['first'])} over {_cell(row['second'])}"
        inside = "yes" if is_inside else "no"
        lines.append(f"| {row['question']} | {pair} | {100 * truth:.1f} % | {_percent(found)} | {inside} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(interval: dict[str, float | None]) -> str:
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    assert value is not None
    return f"{100 * value:.1f} %" + ("" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})")


def _logit(interval: dict[str, float | None]) -> str:
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    assert value is not None
    return f"{value:+.2f}" + ("" if low is None or high is None else f" ({low:+.2f} to {high:+.2f})")


def as_csv(study: Study, raters: Sequence[Rater]) -> str:
    """Return all votes of all raters, one line for each question."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for rater in raters:
        failed = int(has_failed(study, rater))
        for vote in rater.votes:
            item, trial = study.items[vote.trial.item], vote.trial
            for question, answer in vote.answers.items():
                writer.writerow(
                    {
                        "study": study.id,
                        "rater": rater.id,
                        "kind": rater.kind,
                        "has_failed": failed,
                        "trial": vote.number,
                        "item": _harmless(item.name),
                        "prompt": _harmless(item.prompt),
                        "left": _harmless(trial.left),
                        "right": _harmless(trial.right),
                        "question": question,
                        "answer": answer,
                        "preferred": _harmless(arm_of(vote, question)),
                        "catch": "" if trial.catch is None else study.catches[trial.catch].kind,
                        "repeat_of": "" if trial.repeat_of is None else trial.repeat_of,
                        "plays_left": vote.plays[0],
                        "plays_right": vote.plays[1],
                        "shown_s": "" if vote.shown_s is None else vote.shown_s,
                        "time_s": vote.time_s,
                        "note": _harmless(vote.note),
                    }
                )
    return out.getvalue()


def _harmless(text: str) -> str:
    """Keep a spreadsheet from taking a rater's words for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
