"""What the votes of a study say: win rates, Bradley-Terry strengths, side bias, agreement; knows nothing of files.

Repeats and catch trials judge the raters and count in no win rate. "same" and "both bad" are half a win for each.

Legend: N votes, D draws, A arms, P pairs of arms in one order or the other.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.evaluate.study.bootstrap import NUM_DRAWS, Interval, two_way_intervals
from distill.evaluate.study.design import QUESTIONS, Study
from distill.evaluate.study.votes import Rater, Vote, catch_score, has_failed, is_same_answer, repeats_of

UNDECIDED = "undecided"
# A tie between every two arms that met, so that an arm that always wins has a finite strength.
PRIOR_TIES = 1.0
NEWTON_ITERATIONS = 25
MAX_STEP = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PairResult:
    """Two arms under one question.

    Attributes:
        first, second: arms.
        question: key of QUESTIONS.
        wins, losses, same, bad: numbers of votes, as seen from `first`.
        win_rate: of `first`, ties as half.
        verdict: the arm that is preferred; undecided where the interval covers 50 %.
    """

    first: str
    second: str
    question: str
    wins: int
    losses: int
    same: int
    bad: int
    win_rate: Interval
    verdict: str

    @property
    def num_votes(self) -> int:
        """Number of votes."""
        return self.wins + self.losses + self.same + self.bad


def analyse(study: Study, raters: Sequence[Rater], *, seed: int = 0, num_draws: int = NUM_DRAWS) -> dict[str, Any]:
    """Analyse the votes of all raters, and of those who passed the catch trials.

    Args:
        study: the design.
        raters: who takes part in the result, all of one kind.
        seed: of the bootstrap.
        num_draws: of the bootstrap.

    Returns:
        JSON values; `passed` is the result, `all` stands beside it.
    """
    passed = [rater for rater in raters if not has_failed(study, rater)]
    groups = {"passed": passed, "all": list(raters)}
    return {
        "arms": list(study.arms),
        "questions": QUESTIONS,
        "num_prompts": len({item.prompt for item in study.items}),
        "num_items": len(study.items),
        "raters": [_rater_row(study, rater) for rater in raters],
        **{name: _analyse_group(study, group, seed, num_draws) for name, group in groups.items()},
    }


def counting_votes(raters: Sequence[Rater]) -> list[Vote]:
    """Return the votes that count in win rates: first showings, no catch trials."""
    return [
        vote for rater in raters for vote in rater.votes if vote.trial.catch is None and vote.trial.repeat_of is None
    ]


def _analyse_group(study: Study, raters: list[Rater], seed: int, num_draws: int) -> dict[str, Any]:
    votes = counting_votes(raters)
    results: dict[str, Any] = {
        "num_raters": sum(bool(rater.votes) for rater in raters),
        "num_votes": len(votes),
        "pairs": [],
        "strengths": {},
        "side_bias": {},
        "retest": {name: _retest(raters, name) for name in QUESTIONS},
        "agreement": {name: krippendorff_alpha(votes, name) for name in QUESTIONS},
    }
    if not votes:
        return results
    for first, second in itertools.combinations(study.arms, 2):
        between = [vote for vote in votes if {vote.trial.left, vote.trial.right} == {first, second}]
        if between:
            results["pairs"] += [
                _pair_row(pair_result(study, between, first, second, name, seed=seed, num_draws=num_draws))
                for name in QUESTIONS
            ]
    for name in QUESTIONS:
        strengths, side = bradley_terry(study, votes, name, seed=seed, num_draws=num_draws)
        results["strengths"][name] = {arm: interval.as_dict() for arm, interval in strengths.items()}
        results["side_bias"][name] = _side_bias(study, votes, name, side, seed, num_draws)
    return results


def pair_result(
    study: Study,
    votes: Sequence[Vote],
    first: str,
    second: str,
    question: str,
    *,
    seed: int = 0,
    num_draws: int = NUM_DRAWS,
) -> PairResult:
    """Return what the votes between two arms say under one question.

    Args:
        study: the design.
        votes: one or more, all between `first` and `second`.
        first, second: arms; the win rate is that of the first.
        question: key of QUESTIONS.
        seed, num_draws: of the bootstrap.
    """
    outcome = np.array([_outcome(vote, first, question) for vote in votes])
    answers = Counter(vote.answers[question] for vote in votes)

    def win_rate(weights: np.ndarray) -> np.ndarray:
        rate: np.ndarray = ((weights @ outcome) / weights.sum(axis=1))[:, None]
        return rate

    raters, prompts = _labels(study, votes)
    (interval,) = two_way_intervals(win_rate, raters, prompts, seed=seed, num_draws=num_draws, bounds=(0.0, 1.0))
    preferred = first if interval.value > 0.5 else second
    return PairResult(
        first=first,
        second=second,
        question=question,
        wins=int((outcome == 1.0).sum()),
        losses=int((outcome == 0.0).sum()),
        same=answers["same"],
        bad=answers["bad"],
        win_rate=interval,
        verdict=preferred if interval.excludes(0.5) else UNDECIDED,
    )


def _outcome(vote: Vote, arm: str, question: str) -> float:
    answer = vote.answers[question]
    if answer not in ("left", "right"):
        return 0.5
    return float((vote.trial.left if answer == "left" else vote.trial.right) == arm)


def _labels(study: Study, votes: Sequence[Vote]) -> tuple[np.ndarray, np.ndarray]:
    raters = np.array([vote.rater for vote in votes])
    return raters, np.array([study.items[vote.trial.item].prompt for vote in votes])


def bradley_terry(
    study: Study, votes: Sequence[Vote], question: str, *, seed: int = 0, num_draws: int = NUM_DRAWS
) -> tuple[dict[str, Interval], Interval]:
    """Fit logit P(left wins) = strength[left] - strength[right] + side, ties as half a win each way.

    Returns:
        Strengths by arm, in logits around a mean of zero, and the side term: above zero is a lean to the left.
    """
    pairs = list(itertools.permutations(range(len(study.arms)), 2))
    place = {(study.arms[left], study.arms[right]): index for index, (left, right) in enumerate(pairs)}
    index = np.array([place[vote.trial.left, vote.trial.right] for vote in votes])
    left_won = np.array([{"left": 1.0, "right": 0.0}.get(vote.answers[question], 0.5) for vote in votes])
    one_hot = np.eye(len(pairs))[index]
    have_met = [bool({place[a, b], place[b, a]} & set(index)) for a, b in itertools.permutations(study.arms, 2)]
    prior = np.array(have_met) * PRIOR_TIES / 2  # two arms stand there in both orders
    design = np.zeros((len(pairs), len(study.arms) + 1))
    for number, (left, right) in enumerate(pairs):
        design[number, left], design[number, right], design[number, -1] = 1.0, -1.0, 1.0

    def fitted(weights: np.ndarray) -> np.ndarray:
        totals = weights @ one_hot + prior
        wins = (weights * left_won) @ one_hot + prior / 2
        return _fit_logits(design, totals, wins)

    raters, prompts = _labels(study, votes)
    *strengths, side = two_way_intervals(fitted, raters, prompts, seed=seed, num_draws=num_draws)
    return dict(zip(study.arms, strengths, strict=True)), side


def _fit_logits(design: np.ndarray, totals: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """Maximise the likelihood by Newton's method for all draws at once.

    Args:
        design: (P, A + 1), the last column is the side.
        totals, wins: (D, P).

    Returns:
        (D, A + 1); the strengths of a draw sum to zero.
    """
    num_values = design.shape[1]
    theta = np.zeros((len(totals), num_values))
    # Strengths are known up to a constant: the penalty on their sum fixes it and changes nothing else. The small one
    # on all keeps arms at zero that met nobody in a draw.
    penalty = np.zeros((num_values, num_values))
    penalty[:-1, :-1] = 1.0
    penalty += 1e-6 * np.eye(num_values)
    for _ in range(NEWTON_ITERATIONS):
        rate = 1.0 / (1.0 + np.exp(-(theta @ design.T)))
        gradient = (wins - totals * rate) @ design - theta @ penalty
        curvature = np.einsum("dp,pi,pj->dij", totals * rate * (1.0 - rate), design, design) + penalty
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        theta += np.clip(step, -MAX_STEP, MAX_STEP)
        if np.abs(step).max() < 1e-9:
            break
    return theta


def _side_bias(
    study: Study, votes: Sequence[Vote], question: str, side: Interval, seed: int, num_draws: int
) -> dict[str, Any]:
    """Return the share of decided votes that went left; sides are counterbalanced, so 50 % is no bias."""
    decided = [vote for vote in votes if vote.answers[question] in ("left", "right")]
    row: dict[str, Any] = {"num_votes": len(decided), "logit": side.as_dict(), "share_left": None}
    if decided:
        went_left = np.array([float(vote.answers[question] == "left") for vote in decided])

        def share(weights: np.ndarray) -> np.ndarray:
            result: np.ndarray = ((weights @ went_left) / weights.sum(axis=1))[:, None]
            return result

        raters, prompts = _labels(study, decided)
        (interval,) = two_way_intervals(share, raters, prompts, seed=seed, num_draws=num_draws, bounds=(0.0, 1.0))
        row["share_left"] = interval.as_dict()
        row["verdict"] = "no bias seen" if not interval.excludes(0.5) else "left" if interval.value > 0.5 else "right"
    return row


def _retest(raters: Sequence[Rater], question: str) -> dict[str, Any]:
    same = [is_same_answer(a, b, question) for rater in raters for a, b in repeats_of(rater)]
    return {"num_repeats": len(same), "share_same": sum(same) / len(same) if same else None}


def krippendorff_alpha(votes: Sequence[Vote], question: str) -> float | None:
    """Return Krippendorff's alpha of raters who saw the same pair: 1 is full agreement, 0 is what chance gives.

    None where no pair was seen by two raters, or all answers are the same.

    Source: Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), nominal data.
    """
    units: dict[tuple[int, frozenset[str]], Counter[str]] = {}
    for vote in votes:
        answer = vote.answers[question]
        named = {"left": vote.trial.left, "right": vote.trial.right}.get(answer, f"/{answer}")
        key = (vote.trial.item, frozenset((vote.trial.left, vote.trial.right)))
        units.setdefault(key, Counter())[named] += 1
    paired = [unit for unit in units.values() if unit.total() > 1]
    totals: Counter[str] = sum(paired, Counter())
    num_values = totals.total()
    if len(totals) < 2:
        return None
    observed = sum(
        (unit.total() ** 2 - sum(count**2 for count in unit.values())) / (unit.total() - 1) for unit in paired
    )
    expected = (num_values**2 - sum(count**2 for count in totals.values())) / (num_values - 1)
    return 1.0 - observed / expected


def _rater_row(study: Study, rater: Rater) -> dict[str, Any]:
    right, total = catch_score(study, rater)
    repeats = repeats_of(rater)
    decided = [vote.answers["overall"] for vote in rater.votes if vote.answers["overall"] in ("left", "right")]
    return {
        "rater": rater.id,
        "kind": rater.kind,
        "num_answered": len(rater.votes),
        "catches": [right, total],
        "has_failed": has_failed(study, rater),
        "share_left": decided.count("left") / len(decided) if decided else None,
        "repeats_same": [sum(is_same_answer(a, b, "overall") for a, b in repeats), len(repeats)],
    }


def _pair_row(result: PairResult) -> dict[str, Any]:
    total = result.num_votes
    return {
        "first": result.first,
        "second": result.second,
        "question": result.question,
        "num_votes": total,
        "shares": {
            "first": result.wins / total,
            "same": result.same / total,
            "bad": result.bad / total,
            "second": result.losses / total,
        },
        "win_rate": result.win_rate.as_dict(),
        "verdict": result.verdict,
    }
