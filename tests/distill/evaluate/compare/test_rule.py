"""The rule: no loss to the baseline, the best by mean rank, and of what cannot be told apart the cheapest."""

from typing import Any

from synthetic_comparison import RULED, comparison

from distill.evaluate.compare.results import Comparison
from distill.evaluate.compare.roles import control_pairs, curve_arms, floor_of, main_arms, members
from distill.evaluate.compare.rule import pick, picks, recommendation, recommended


def ruled(errors: dict[str, float], **changes: Any) -> Comparison:
    """Return a comparison in which arms have these errors in all metrics, the truth .01 and the others .2."""
    errors = {"truth": 0.01, **errors}
    table = {**RULED, **changes}
    return Comparison(comparison(table, lambda arm, updates, metric: errors.get(arm, 0.2), spread=0.004))


def test_an_arm_has_the_part_that_its_settings_give_it() -> None:
    table = ruled({}).table
    assert {member.name: member.role for member in members(table)} == {
        "truth": "reference",
        "teacher_4": "reference",
        "start_network": "reference",
        "dmd": "baseline",
        "codmd": "term",
        "control": "control",
        "old_control": "control",
        "rival": "loss",
        "alone": "regressed",
        "dmd+start": "baseline",
    }
    assert control_pairs(table) == [("codmd", "control")] and floor_of(table) == "truth"
    assert main_arms(table) == ["dmd", "codmd", "control", "rival", "alone", "dmd+start"]
    assert curve_arms(table) == ["dmd", "codmd", "control", "rival", "dmd+start"]
    # Where the teacher is not the truth, students are asked to match the teacher.
    assert floor_of({**table, "recipe": "shapeworld"}) == "teacher_4"


def test_what_cannot_be_told_apart_goes_to_the_cheapest() -> None:
    found = pick(ruled({}).last_settings[0])
    assert (
        found.lost == {} and found.winner == "alone" and min(found.costs, key=lambda arm: found.costs[arm]) == "alone"
    )


def test_a_better_arm_wins_over_a_cheaper_one() -> None:
    found = pick(ruled({"rival": 0.1}).last_settings[0])
    assert found.winner == found.leader == "rival" and found.ranks["rival"] == 1.0


def test_an_arm_that_loses_a_metric_or_is_a_control_is_no_candidate() -> None:
    errors = {"alone": 0.3, "control": 0.01, "dmd+start": 0.1, "rival": 0.1}
    found = pick(ruled(errors).last_settings[0])
    assert found.lost == {"alone": ["tau_err", "w1"]}
    # Both halve the error, and the started one costs as much here: the rival comes first in the table.
    assert found.costs["rival"] == found.costs["dmd+start"] and found.winner == "rival"


def test_of_equal_cost_the_first_in_the_table_wins() -> None:
    found = pick(ruled({"alone": 0.3}).last_settings[0])
    assert found.costs["dmd"] == found.costs["codmd"] and found.winner == "dmd"


def test_shapeworld_decides_and_otherwise_the_most_worlds() -> None:
    exact = [ruled({"rival": 0.1}, name="a"), ruled({"rival": 0.1}, name="b"), ruled({"dmd+start": 0.1}, name="c")]
    assert recommended(picks(exact)) == "rival"
    text = recommendation(exact)
    assert text.startswith(
        "We would train **rival**: the rule written before the runs picks it in a and b and dmd+start in c (5 seeds), "
        "because it closes "
    )
    assert "of the gap in tau_err between dmd and the floor" in text
    shape = ruled({"dmd+start": 0.1}, name="shapeworld")
    shape = Comparison({**shape.data, "table": {**shape.table, "recipe": "shapeworld"}})
    assert recommended(picks([*exact, shape])) == "dmd+start"
    assert "picks it in c and shapeworld and rival in a and b (5 seeds), and shapeworld decides, because it closes" in (
        recommendation([*exact, shape])
    )
    tied = recommendation([ruled({"rival": 0.1}, name="a"), ruled({}, name="b")])
    assert "**alone**: the rule written before the runs picks it in b and rival in a (5 seeds), because" in tied
    assert "because it is the cheapest of those picked equally often and no candidate that costs more" in tied
    assert "was shown to be better in b. These worlds have" in tied
    worse = recommendation([ruled({"alone": 0.1}, name="a"), ruled({"alone": 0.3, "rival": 0.1}, name="b")])
    assert "picks it in a and rival in b" in worse
    assert "was shown to be better. It is worse than dmd in b (tau_err, w1). These worlds have" in worse
    assert (
        "because no candidate that costs more was shown to be better. These worlds have an exact teacher"
        in recommendation([ruled({"alone": 0.3}, name="d")])
    )
    without = Comparison({**shape.data, "table": {**shape.table, "rule": ""}})
    assert picks([without]) == [] and recommendation([without]) == ""


def test_a_share_that_may_be_nothing_is_no_reason() -> None:
    """In the leading metric the baseline is at the floor, and the pick is better in the other alone."""
    errors = {"truth": 0.01, "rival": 0.1}
    data = comparison(
        {**RULED, "name": "e"},
        lambda arm, updates, metric: 0.2 if metric == "tau_err" else errors.get(arm, 0.2),
        spread=0.004,
    )
    text = recommendation([Comparison(data)])
    assert "**rival**" in text and "because it is better than dmd in 1 of 2 comparisons and no candidate" in text
    assert "%" not in text
