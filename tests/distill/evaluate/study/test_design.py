"""The design: sides are counterbalanced, pairs are shown equally often, repeats come late and catch trials balanced."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from studies import design

from codmd_serve.errors import ConfigError
from distill.evaluate.study.design import (
    BROKEN,
    MISMATCHED,
    STUDY_FILE,
    Catch,
    Study,
    Trial,
    read_study,
    right_answer,
    trials_of,
    video_files,
    video_token,
    write_study,
)


def counting(study: Study, rater: int) -> list[Trial]:
    return [trial for trial in trials_of(study, rater) if trial.catch is None and trial.repeat_of is None]


@pytest.mark.parametrize(("num_arms", "num_prompts", "per_rater"), [(2, 8, 0), (2, 7, 0), (3, 5, 0), (3, 10, 7)])
def test_two_times_around_show_every_pair_once_on_each_side(num_arms: int, num_prompts: int, per_rater: int) -> None:
    study = design(num_arms, num_prompts, pairs_per_rater=per_rater)
    num_raters = 2 * study.num_pairs if per_rater else 2
    shown = Counter(
        (trial.item, trial.left, trial.right) for rater in range(num_raters) for trial in counting(study, rater)
    )
    times = per_rater if per_rater else 1
    assert len(shown) == 2 * study.num_pairs and set(shown.values()) == {times}


def test_sides_are_balanced_within_one_rater() -> None:
    study = design(3, 20)
    for rater in range(6):
        lefts = Counter((trial.left, trial.right) for trial in counting(study, rater))
        assert all(abs(lefts[a, b] - lefts[b, a]) <= 1 for a, b in (("a", "b"), ("a", "c"), ("b", "c")))


def test_broken_videos_stand_left_as_often_as_right() -> None:
    study = design(2, 8, num_catches=6)
    for rater in range(4):
        catches = [trial for trial in trials_of(study, rater) if trial.catch is not None]
        assert Counter(trial.left == BROKEN for trial in catches) == {True: 3, False: 3}


def test_the_same_prompt_is_not_shown_twice_in_a_row() -> None:
    study = design(3, 6)
    for rater in range(20):
        items = [trial.item for trial in trials_of(study, rater)]
        assert all(a != b for a, b in pairwise(items))


@pytest.mark.parametrize("num_prompts", [2, 3, 8, 30])
def test_repeats_come_after_their_trial_with_swapped_sides(num_prompts: int) -> None:
    study = design(2, num_prompts)
    study = replace(study, num_repeats=study.pairs_per_rater)
    for rater in range(10):
        trials = trials_of(study, rater)
        repeats = [(number, trial) for number, trial in enumerate(trials) if trial.repeat_of is not None]
        assert len(repeats) == study.num_repeats and len(trials) == study.num_trials
        assert len({trial.repeat_of for _, trial in repeats}) == len(repeats)
        for number, trial in repeats:
            assert trial.repeat_of is not None and trial.repeat_of < number
            original = trials[trial.repeat_of]
            assert original == Trial(trial.item, trial.right, trial.left)


def test_raters_see_other_orders_and_a_rater_always_the_same() -> None:
    study = design(2, 12)
    assert trials_of(study, 3) == trials_of(study, 3)
    orders = {tuple(trial.item for trial in trials_of(study, rater)) for rater in range(8)}
    assert len(orders) == 8


def test_right_answers_of_catch_trials() -> None:
    study = replace(design(2, 3), catches=(Catch(BROKEN, 0, "a", 0), Catch(MISMATCHED, 1, "b", 2)))
    assert right_answer(study, Trial(0, "a", BROKEN, catch=0)) == ("overall", "left")
    assert right_answer(study, Trial(1, MISMATCHED, "b", catch=1)) == ("prompt", "right")
    assert right_answer(study, Trial(0, "a", "b")) is None


def test_names_and_addresses_of_videos_tell_nothing() -> None:
    study = replace(design(2, 3), catches=(Catch(BROKEN, 0, "a", 0), Catch(MISMATCHED, 0, "a", 2)))
    arm, broken = video_files(study, Trial(0, "a", BROKEN, catch=0))
    again, mismatched = video_files(study, Trial(0, "a", MISMATCHED, catch=1))
    assert arm == again and len({arm, broken, mismatched}) == 3
    assert all(len(name) == 28 and set(name[:-4]) <= set("0123456789abcdef") for name in (arm, broken, mismatched))
    tokens = {video_token(study, rater, number, side) for rater in "xy" for number in range(3) for side in ("l", "r")}
    assert len(tokens) == 12
    other = replace(study, salt="other")
    assert video_files(other, Trial(0, "a", "b"))[0] != arm


def test_study_survives_its_file(tmp_path: Path) -> None:
    study = replace(design(3, 4), catches=(Catch(BROKEN, 0, "a", 0),), title="Welches ist \u2018besser\u2019?")
    write_study(study, tmp_path)
    assert read_study(tmp_path) == study


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no study"),
        ("{}", "another format"),
        ('{"format": 1}', "damaged"),
        ("[]", "one JSON object"),
        ('{"format": 1, "arms": 3, "items": [], "catches": []}', "damaged"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_damaged_study_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / STUDY_FILE).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_study(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"arms": ("a",)},
        {"arms": ("a", "a")},
        {"arms": ("a", BROKEN)},
        {"items": ()},
        {"pairs_per_rater": 0},
        {"pairs_per_rater": 9},
        {"num_repeats": 9},
        {"catch_pass_share": 1.5},
    ],
)
def test_impossible_designs_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(design(2, 8), **change)  # type: ignore[arg-type]
