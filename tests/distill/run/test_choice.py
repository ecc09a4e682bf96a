"""The best validation so far, in both directions, and patience; the same after a resume."""

import pytest

from distill.run.choice import Choice, choice_of


@pytest.mark.parametrize(("better", "best"), [("high", (3, 0.9)), ("low", (2, 0.1))])
def test_the_best_is_kept_in_the_direction_of_the_metric(better: str, best: tuple[int, float]) -> None:
    choice = Choice(metric="a.b", better=better)
    added = [choice.add(iteration, value) for iteration, value in enumerate([0.5, 0.1, 0.9, 0.1, 0.9], start=1)]
    assert (choice.best_iteration, choice.best) == best
    # An equal value is no new best: the earlier student took less training.
    assert added == ([True, False, True, False, False] if better == "high" else [True, True, False, False, False])
    assert choice.iteration == 5


def test_patience_counts_validations_without_a_new_best_and_no_failed_ones() -> None:
    choice = Choice(metric="a.b")
    for iteration, value in enumerate([1.0, 0.5, None, 0.5], start=1):
        assert not choice.is_over(2)
        choice.add(iteration, value)
    assert choice.num_worse == 2 and choice.is_over(2)
    assert not choice.is_over(3) and not choice.is_over(0)
    choice.add(5, 2.0)
    assert not choice.is_over(1)


def test_a_choice_goes_on_from_its_values_and_forgets_another_metrics() -> None:
    choice = Choice(metric="a.b", better="low")
    for iteration, value in enumerate([1.0, 2.0], start=1):
        choice.add(iteration, value)
    again = choice_of(choice.values())
    again.follow("a.b", "low")
    assert again == choice
    again.follow("a.c", "high")
    assert again == Choice(metric="a.c", better="high", iteration=2)
    assert choice_of({}) == Choice()
