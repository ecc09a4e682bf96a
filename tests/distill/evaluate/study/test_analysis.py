"""The analysis: planted strengths, side bias, clickers and repeats are found, and intervals cover what was planted."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from studies import design

from codmd_serve.errors import ConfigError
from distill.evaluate.study.analysis import (
    UNDECIDED,
    analyse,
    bradley_terry,
    counting_votes,
    krippendorff_alpha,
    pair_result,
)
from distill.evaluate.study.bootstrap import two_way_intervals
from distill.evaluate.study.design import BROKEN, QUESTIONS, Study, Trial, trials_of
from distill.evaluate.study.simulate import Crowd, simulate
from distill.evaluate.study.votes import Rater, Vote, catch_score, has_failed, is_same_answer, read_votes

NUM_DRAWS = 400


def simulated(study: Study, **options: Any) -> list[Rater]:
    raters, num_odd = read_votes(study, simulate(study, Crowd(**options)))
    assert num_odd == 0
    return raters


def vote(rater: str, item: int, left: str, right: str, answer: str, number: int = 0) -> Vote:
    return Vote(rater, number, Trial(item, left, right), dict.fromkeys(QUESTIONS, answer))


def mean(values: np.ndarray) -> Any:
    return lambda weights: ((weights @ values) / weights.sum(axis=1))[:, None]


def test_win_rate_counts_ties_as_half_whatever_the_side() -> None:
    study = design(2, 4)
    votes = [
        vote("x", 0, "a", "b", "left"),
        vote("x", 1, "b", "a", "right"),
        vote("y", 2, "a", "b", "right"),
        vote("y", 3, "b", "a", "same"),
        vote("y", 0, "b", "a", "bad"),
    ]
    result = pair_result(study, votes, "a", "b", "overall", num_draws=NUM_DRAWS)
    assert (result.wins, result.losses, result.same, result.bad) == (2, 1, 1, 1)
    assert result.win_rate.value == pytest.approx(3 / 5)
    other = pair_result(study, votes, "b", "a", "overall", num_draws=NUM_DRAWS)
    assert other.win_rate.value == pytest.approx(2 / 5)
    assert other.win_rate.low == pytest.approx(1 - result.win_rate.high, abs=0.05)


def test_planted_win_rates_lie_in_their_intervals() -> None:
    """In .95 of intervals; those of one crowd go wrong together, so eight crowds are counted."""
    study, inside = design(3, 24), list[bool]()
    for seed in range(8):
        crowd = Crowd(strengths={"a": 0.9, "b": 0.3, "c": 0.0}, num_raters=14, side_bias=0.4, seed=seed)
        raters, _ = read_votes(study, simulate(study, crowd))
        rows = analyse(study, raters, num_draws=NUM_DRAWS)["passed"]["pairs"]
        assert len(rows) == 3 * len(QUESTIONS)
        inside += [
            row["win_rate"]["low"] <= crowd.win_rate(row["first"], row["second"]) <= row["win_rate"]["high"]
            for row in rows
        ]
    assert 0.88 <= sum(inside) / len(inside) <= 1.0
    verdicts = {(row["first"], row["second"]): row["verdict"] for row in rows if row["question"] == "overall"}
    assert verdicts["a", "c"] == "a"


def test_equal_arms_are_undecided() -> None:
    study = design(2, 24)
    rows = analyse(study, simulated(study, strengths={"a": 0.0, "b": 0.0}, side_bias=1.0), num_draws=NUM_DRAWS)
    assert {row["verdict"] for row in rows["passed"]["pairs"]} == {UNDECIDED}
    (row,) = [row for row in rows["passed"]["pairs"] if row["question"] == "overall"]
    assert row["win_rate"]["low"] < 0.5 < row["win_rate"]["high"]


@pytest.mark.parametrize(("bias", "verdict"), [(0.8, "left"), (-0.8, "right"), (0.0, "no bias seen")])
def test_side_bias_is_seen_and_does_not_move_the_win_rate(bias: float, verdict: str) -> None:
    study = design(2, 40)
    raters = simulated(study, strengths={"a": 0.5, "b": 0.0}, num_raters=16, side_bias=bias, seed=1)
    group = analyse(study, raters, num_draws=NUM_DRAWS)["passed"]
    bias_row = group["side_bias"]["overall"]
    assert bias_row["verdict"] == verdict
    assert np.sign(bias_row["logit"]["value"]) == np.sign(bias) or bias == 0.0
    (row,) = [row for row in group["pairs"] if row["question"] == "overall"]
    assert 0.52 < row["win_rate"]["value"] < 0.68


def test_bradley_terry_finds_the_planted_strengths() -> None:
    study = design(4, 30)
    planted = {"a": 1.0, "b": 0.5, "c": 0.0, "d": -0.5}
    raters = simulated(
        study, strengths=planted, num_raters=20, tie_share=0.0, rater_sd=0.0, prompt_sd=0.0, side_bias=0.5, seed=2
    )
    strengths, side = bradley_terry(study, counting_votes(raters), "overall", num_draws=NUM_DRAWS)
    centre = sum(planted.values()) / 4
    for arm, interval in strengths.items():
        assert interval.value == pytest.approx(planted[arm] - centre, abs=0.12)
        assert interval.low < interval.value < interval.high
    assert sum(interval.value for interval in strengths.values()) == pytest.approx(0.0, abs=1e-6)
    assert side.value == pytest.approx(0.5, abs=0.1)


def test_arm_that_always_wins_has_a_finite_strength() -> None:
    study = design(2, 10)
    votes = [vote(f"r{rater}", item, "a", "b", "left") for rater in range(4) for item in range(5)]
    votes += [vote(f"r{rater}", item, "b", "a", "right") for rater in range(4) for item in range(5, 10)]
    strengths, _ = bradley_terry(study, votes, "overall", num_draws=NUM_DRAWS)
    assert 1.0 < strengths["a"].value < 5.0 and np.isfinite([strengths["a"].low, strengths["a"].high]).all()
    result = pair_result(study, votes, "a", "b", "overall", num_draws=NUM_DRAWS)
    assert (result.win_rate.value, result.win_rate.high, result.verdict) == (1.0, 1.0, "a")


def test_raters_who_fail_the_catch_trials_are_left_out_of_the_result() -> None:
    study = design(2, 24, num_catches=6)
    strengths = {"a": 1.0, "b": 0.0}
    raters = simulated(study, strengths=strengths, num_raters=10, num_clickers=3, attention=1.0, seed=1)
    numbers = analyse(study, raters, num_draws=NUM_DRAWS)
    assert [row["has_failed"] for row in numbers["raters"]] == [True] * 3 + [False] * 7
    assert (numbers["passed"]["num_raters"], numbers["all"]["num_raters"]) == (7, 10)
    rates = {name: numbers[name]["pairs"][0]["win_rate"]["value"] for name in ("passed", "all")}
    assert rates["passed"] > rates["all"]


def test_catch_trials_and_repeats_count_in_no_win_rate() -> None:
    study = design(2, 8, num_catches=3)
    raters = simulated(study, strengths={"a": 0.0, "b": 0.0}, num_raters=2)
    votes = counting_votes(raters)
    assert len(votes) == 2 * study.pairs_per_rater
    assert all(BROKEN not in (each.trial.left, each.trial.right) for each in votes)


def test_rule_for_catch_trials_is_that_of_the_study() -> None:
    study = design(2, 8, num_catches=4)

    def answered(num_right: int) -> Rater:
        rater = Rater("x", "human")
        for number, trial in enumerate(each for each in trials_of(study, 0) if each.catch is not None):
            good, bad = ("right", "left") if trial.left == BROKEN else ("left", "right")
            answers = dict.fromkeys(QUESTIONS, good if number < num_right else bad)
            rater.votes.append(Vote("x", number, trial, answers))
        return rater

    assert catch_score(study, answered(3)) == (3, 4)
    assert [has_failed(study, answered(right)) for right in range(5)] == [True, True, True, False, False]
    assert not has_failed(study, Rater("x", "human")), "who has answered none is not judged"
    assert has_failed(replace(study, catch_pass_share=1.0), answered(3))


def test_repeats_are_compared_with_sides_swapped_back() -> None:
    first = vote("x", 0, "a", "b", "left")
    for answer, is_same in (("right", True), ("left", False), ("same", False)):
        assert is_same_answer(first, vote("x", 0, "b", "a", answer, 5), "look") is is_same
    assert is_same_answer(vote("x", 0, "a", "b", "bad"), vote("x", 0, "b", "a", "bad"), "look")


def test_steady_raters_have_a_perfect_retest_and_perfect_agreement() -> None:
    study = design(2, 12)
    raters = simulated(
        study, strengths={"a": 40.0, "b": 0.0}, tie_share=0.0, side_bias=0.0, rater_sd=0.0, prompt_sd=0.0
    )
    group = analyse(study, raters, num_draws=50)["passed"]
    assert group["retest"]["overall"] == {"num_repeats": 48, "share_same": 1.0}
    assert group["agreement"]["overall"] is None, "one answer only: chance explains it as well"
    votes = [vote(f"r{rater}", item, "a", "b", "left" if item % 2 else "right") for rater in "xyz" for item in range(6)]
    assert krippendorff_alpha(votes, "overall") == pytest.approx(1.0)


def test_krippendorff_alpha_of_a_published_example() -> None:
    """Krippendorff (2011), data of four observers on twelve units, nominal: alpha .743."""
    table = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    # Five values: four answers, and a fifth that another pair of arms stands for.
    words = {1: ("a", "left"), 2: ("a", "right"), 3: ("a", "same"), 4: ("a", "bad"), 5: ("z", "left")}
    votes = []
    for row, values in enumerate(table):
        for item, value in enumerate(values):
            if value is not None:
                arm, answer = words[value]
                # The fifth value names arm b of the pair {a, b} by another side than the second does.
                trial = Trial(item, "a", "b") if arm == "a" else Trial(item, "c", "d")
                votes.append(Vote(f"r{row}", item, trial, dict.fromkeys(QUESTIONS, answer)))
    assert krippendorff_alpha(votes, "overall") == pytest.approx(0.743, abs=0.0005)


def test_interval_of_votes_that_share_a_rater_is_wider() -> None:
    rng = np.random.default_rng(0)
    raters, prompts = (each.ravel() for each in np.meshgrid(np.arange(12), np.arange(30), indexing="ij"))
    noise = rng.normal(size=360)
    shared = rng.normal(size=12)[raters] * 2
    plain, clustered = (
        two_way_intervals(mean(values), raters, prompts, num_draws=NUM_DRAWS)[0] for values in (noise, noise + shared)
    )
    width = 2 * 1.96 / np.sqrt(360)
    assert 0.8 * width < plain.high - plain.low < 1.5 * width
    assert clustered.high - clustered.low > 5 * width


def test_interval_of_one_rater_is_over_prompts_and_of_one_vote_is_none() -> None:
    values = np.array([0.0, 1.0, 1.0, 1.0])
    (one,) = two_way_intervals(mean(values), np.zeros(4), np.arange(4), num_draws=NUM_DRAWS)
    assert one.value == 0.75 and one.low < 0.75 < one.high
    (other,) = two_way_intervals(mean(values), np.arange(4), np.zeros(4), num_draws=NUM_DRAWS)
    assert other.low < 0.75 < other.high
    (none,) = two_way_intervals(mean(values), np.zeros(4), np.zeros(4), num_draws=NUM_DRAWS)
    assert none.as_dict() == {"value": 0.75, "low": None, "high": None} and not none.excludes(0.5)


def test_study_of_one_rater_says_undecided() -> None:
    study = design(2, 2)
    raters = simulated(study, strengths={"a": 0.0, "b": 0.0}, num_raters=1)
    raters[0].votes = [each for each in raters[0].votes if each.trial.repeat_of is None][:1]
    numbers = analyse(study, raters, num_draws=50)
    assert {row["verdict"] for row in numbers["passed"]["pairs"]} <= {UNDECIDED}


def test_study_without_votes_has_no_result() -> None:
    study = design(2, 4)
    group = analyse(study, [])["passed"]
    assert group["pairs"] == [] and group["num_votes"] == 0


def test_records_that_fit_nothing_are_counted_and_skipped() -> None:
    study = design(2, 4)
    records = simulate(study, Crowd(strengths={"a": 0.0, "b": 0.0}, num_raters=2))
    whole = records[1]
    damaged: list[dict[str, Any]] = [
        {**whole, "rater": "nobody"},
        {**whole, "item": 99},
        {**whole, "left": "zebra"},
        {**whole, "catch": 99},
        {**whole, "answers": {"overall": "left"}},
        {**whole, "answers": dict.fromkeys(QUESTIONS, "neither")},
        {**whole, "trial": "first"},
        {"type": "remark"},
        {},
    ]
    again = {**whole, "answers": dict.fromkeys(QUESTIONS, "bad")}
    raters, num_odd = read_votes(study, [*records, *damaged, again])
    assert num_odd == len(damaged)
    assert [len(rater.votes) for rater in raters] == [study.num_trials] * 2
    assert raters[0].votes[0].answers == whole["answers"], "the first answer counts"
    with pytest.raises(ConfigError, match="another study"):
        read_votes(replace(study, id="other"), records)


def test_planted_win_rate_is_what_a_large_crowd_shows() -> None:
    study = design(2, 200, num_catches=0)
    crowd = Crowd(strengths={"a": 0.7, "b": 0.0}, num_raters=100, side_bias=0.5, rater_sd=0.8, prompt_sd=0.6, seed=5)
    raters, _ = read_votes(study, simulate(study, crowd))
    votes = counting_votes(raters)
    wins = [
        0.5 if each.answers[name] in ("same", "bad") else float(getattr(each.trial, each.answers[name]) == "a")
        for each in votes
        for name in QUESTIONS
    ]
    # Four questions of 100 raters with tastes of their own: a standard error of about .01.
    assert np.mean(wins) == pytest.approx(crowd.win_rate("a", "b"), abs=0.04)
    assert crowd.win_rate("a", "b") + crowd.win_rate("b", "a") == pytest.approx(1.0)


@pytest.mark.parametrize("options", [{"num_clickers": 13}, {"num_raters": 0}, {"tie_share": 1.0}, {"attention": 2.0}])
def test_impossible_crowds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Crowd(strengths={"a": 0.0}, **options)


def test_crowd_without_a_strength_for_an_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match="no strength for b"):
        simulate(design(2, 3), Crowd(strengths={"a": 1.0}))
