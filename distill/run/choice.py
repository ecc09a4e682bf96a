"""Which validation was the best so far, and for how many there was no better one; pure, and part of each checkpoint."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.settings import HIGH


@dataclass(kw_only=True, slots=True)
class Choice:
    """The best validation of a run and what came after it; equal on all ranks.

    Attributes:
        metric: SUITE.VALUE; empty before the first validation.
        better: high or low.
        best: its best value so far; None before the first.
        best_iteration: of that value.
        num_worse: validations since then; failed ones do not count.
        iteration: of the last validation, failed or not; 0 before the first.
    """

    metric: str = ""
    better: str = HIGH
    best: float | None = None
    best_iteration: int = 0
    num_worse: int = 0
    iteration: int = 0

    def follow(self, metric: str, better: str) -> None:
        """Choose by this metric from now on; what another one chose is forgotten."""
        if (metric, better) != (self.metric, self.better):
            self.metric, self.better, self.best, self.best_iteration, self.num_worse = metric, better, None, 0, 0

    def add(self, iteration: int, value: float | None) -> bool:
        """Enter a validation.

        Args:
            iteration: iterations done.
            value: of the metric; None when the validation failed.

        Returns:
            Whether it is the best so far.
        """
        self.iteration = iteration
        if value is None:
            return False
        if self.best is None or is_better(value, self.best, self.better):
            self.best, self.best_iteration, self.num_worse = value, iteration, 0
            return True
        self.num_worse += 1
        return False

    def is_over(self, patience: int) -> bool:
        """Whether the run ends because `patience` validations in a row brought no new best; 0 is never."""
        return 0 < patience <= self.num_worse

    def values(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        return dataclasses.asdict(self)


def is_better(value: float, best: float, better: str) -> bool:
    """Whether a value beats the best so far; an equal one does not."""
    return value > best if better == HIGH else value < best


def choice_of(values: Mapping[str, Any]) -> Choice:
    """Return the state that `Choice.values` gave; a checkpoint of an older version has none.

    Raises:
        TypeError: unknown or misplaced values.
    """
    return Choice(**values)
