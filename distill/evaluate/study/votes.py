"""Reads the records of a log into votes, and judges raters by their catch trials; knows nothing of intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from codmd_serve.errors import ConfigError
from distill.evaluate.study.design import ANSWERS, CATCH_QUESTION, QUESTIONS, SWAPPED, Study, Trial, right_answer


@dataclass(frozen=True, slots=True)
class Vote:
    """The answers of one rater to one trial.

    Attributes:
        rater: id.
        number: of the trial, of this rater.
        trial: what was shown.
        answers: by question.
        note: what the rater wrote.
        plays: how often left and right were played to the end.
        shown_s: seconds from showing to answering; None where nobody knows.
        time_s: seconds since 1970.
    """

    rater: str
    number: int
    trial: Trial
    answers: dict[str, str]
    note: str = ""
    plays: tuple[int, int] = (0, 0)
    shown_s: float | None = None
    time_s: float = 0.0


@dataclass(slots=True)
class Rater:
    """One rater.

    Attributes:
        id: random id.
        kind: human, automated, rehearsal or simulated.
        votes: in order.
    """

    id: str
    kind: str
    votes: list[Vote] = field(default_factory=list)


def read_votes(study: Study, records: Sequence[dict[str, Any]]) -> tuple[list[Rater], int]:
    """Sort the records of a log by rater.

    The first answer to a trial counts; the same trial again, from a crash between log and reply, does not.

    Returns:
        Raters in the order they came, and the number of records that fit no trial of the study.

    Raises:
        ConfigError: the records are of another study.
    """
    raters: dict[str, Rater] = {}
    num_odd = 0
    for record in records:
        rater = record.get("rater")
        if record.get("type") == "rater" and isinstance(rater, str):
            if record.get("study") != study.id:
                raise ConfigError("the answers are of another study than study.json")
            raters.setdefault(rater, Rater(rater, str(record.get("kind"))))
        elif record.get("type") == "answer" and isinstance(rater, str) and rater in raters:
            vote = _vote(study, record)
            if vote is None:
                num_odd += 1
            elif all(vote.number != known.number for known in raters[rater].votes):
                raters[rater].votes.append(vote)
        else:
            num_odd += 1
    return list(raters.values()), num_odd


def _vote(study: Study, record: dict[str, Any]) -> Vote | None:
    number, item, catch, repeat_of = (record.get(name) for name in ("trial", "item", "catch", "repeat_of"))
    left, right, answers = record.get("left"), record.get("right"), record.get("answers")
    known = study.arms if catch is None else (*study.arms, *CATCH_QUESTION)
    is_whole = (
        isinstance(number, int)
        and _is_index(item, len(study.items))
        and (catch is None or _is_index(catch, len(study.catches)))
        and left in known
        and right in known
        and isinstance(answers, dict)
        and all(answers.get(name) in ANSWERS for name in QUESTIONS)
    )
    if not is_whole:
        return None
    plays = record.get("plays")
    return Vote(
        rater=str(record["rater"]),
        number=int(record["trial"]),
        trial=Trial(int(record["item"]), str(left), str(right), catch, repeat_of),
        answers={name: str(record["answers"][name]) for name in QUESTIONS},
        note=str(record.get("note", "")),
        plays=(int(plays[0]), int(plays[1])) if isinstance(plays, list) and len(plays) == 2 else (0, 0),
        shown_s=record.get("shown_s"),
        time_s=float(record.get("time", 0.0)),
    )


def _is_index(value: object, size: int) -> bool:
    return isinstance(value, int) and 0 <= value < size


def catch_score(study: Study, rater: Rater) -> tuple[int, int]:
    """Return how many catch trials a rater answered right, and how many at all."""
    right = total = 0
    for vote in rater.votes:
        expected = right_answer(study, vote.trial)
        if expected is not None:
            total += 1
            right += vote.answers[expected[0]] == expected[1]
    return right, total


def has_failed(study: Study, rater: Rater) -> bool:
    """Whether a rater falls below the share of right catch trials that was fixed when the study was made."""
    right, total = catch_score(study, rater)
    return total > 0 and right < study.catch_pass_share * total


def repeats_of(rater: Rater) -> list[tuple[Vote, Vote]]:
    """Return pairs of first showing and swapped repeat, where both were answered."""
    by_number = {vote.number: vote for vote in rater.votes}
    return [
        (by_number[vote.trial.repeat_of], vote)
        for vote in rater.votes
        if vote.trial.repeat_of is not None and vote.trial.repeat_of in by_number
    ]


def arm_of(vote: Vote, question: str) -> str:
    """Return the arm that a vote prefers, or same or bad."""
    answer = vote.answers[question]
    return {"left": vote.trial.left, "right": vote.trial.right}.get(answer, answer)


def is_same_answer(first: Vote, second: Vote, question: str) -> bool:
    """Whether a swapped repeat was answered as the first showing."""
    return SWAPPED[second.answers[question]] == first.answers[question]
