"""Simulated raters of planted strength and side bias: the self-test of the analysis. Never a result.

A rater prefers the left video with probability logistic(strength[left] - strength[right] + own taste + taste for the
prompt + side bias), and otherwise calls a share of the pairs the same or both bad. Clickers choose at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from codmd_serve.errors import ConfigError
from distill.evaluate.study.design import (
    ANSWERS,
    BROKEN,
    QUESTIONS,
    Catch,
    Item,
    Study,
    Trial,
    right_answer,
    trials_of,
)
from distill.evaluate.study.session import SIMULATED

_CROWD_STREAM = 9
_QUADRATURE_POINTS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Crowd:
    """Simulated raters.

    Attributes:
        strengths: logits by arm; the difference of two is the log-odds of a preference.
        num_raters: how many.
        num_clickers: how many of them choose at random.
        side_bias: logits in favour of the left video.
        rater_sd, prompt_sd: spread of tastes among raters and among prompts, in logits, for each pair of arms.
        tie_share: share of the pairs that are called the same or both bad, half each.
        attention: share of the catch trials that are answered right.
        seed: of all of it.
    """

    strengths: dict[str, float]
    num_raters: int = 12
    num_clickers: int = 0
    side_bias: float = 0.0
    rater_sd: float = 0.4
    prompt_sd: float = 0.4
    tie_share: float = 0.2
    attention: float = 0.97
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.num_clickers <= self.num_raters or self.num_raters < 1:
            raise ConfigError(f"clickers must be among the raters, got {self.num_clickers} of {self.num_raters}")
        if not 0.0 <= self.tie_share < 1.0 or not 0.0 <= self.attention <= 1.0:
            raise ConfigError("tie_share must be in [0, 1), attention in [0, 1]")

    def win_rate(self, first: str, second: str) -> float:
        """Return the win rate of one arm over another that is planted: over all tastes, both sides, ties as half."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_POINTS)
        taste = np.hypot(self.rater_sd, self.prompt_sd) * nodes
        edge = self.strengths[first] - self.strengths[second]
        rates = [(_logistic(edge + taste + side) * weights).sum() / weights.sum() for side in self._sides()]
        return float(self.tie_share / 2 + (1.0 - self.tie_share) * np.mean(rates))

    def _sides(self) -> tuple[float, float]:
        return self.side_bias, -self.side_bias


def simulated_study(
    arms: Sequence[str], num_prompts: int, *, pairs_per_rater: int = 0, num_catches: int = 4, seed: int = 0
) -> Study:
    """Return a design without videos, for a simulation."""
    num_pairs = num_prompts * len(arms) * (len(arms) - 1) // 2
    pairs = pairs_per_rater or num_pairs
    return Study(
        id="simulated",
        salt="simulated",
        title="simulated study",
        arms=tuple(arms),
        items=tuple(Item(f"{number:04d}", f"prompt {number}") for number in range(num_prompts)),
        catches=tuple(
            Catch(BROKEN, number % num_prompts, arms[number % len(arms)], number % num_prompts)
            for number in range(num_catches)
        ),
        pairs_per_rater=pairs,
        num_repeats=min(4, pairs),
        seed=seed,
    )


def simulate(study: Study, crowd: Crowd) -> list[dict[str, Any]]:
    """Return the records that a log would hold if the crowd had taken part; all are marked as simulated.

    Raises:
        ConfigError: no strength for an arm.
    """
    missing = [arm for arm in study.arms if arm not in crowd.strengths]
    if missing:
        raise ConfigError(f"no strength for {', '.join(missing)}; there are {', '.join(crowd.strengths)}")
    rng = np.random.default_rng([crowd.seed, _CROWD_STREAM])
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(item.prompt for item in study.items))}
    num_questions, num_arms = len(QUESTIONS), len(study.arms)
    # Antisymmetric in the two arms: a taste for the one is a taste against the other.
    prompt_taste = crowd.prompt_sd * _tastes(rng, (len(prompts), num_questions), num_arms)
    records: list[dict[str, Any]] = []
    for number in range(crowd.num_raters):
        rater_taste = crowd.rater_sd * _tastes(rng, (num_questions,), num_arms)
        rater = f"simulated-{number:04d}"
        is_clicker = number < crowd.num_clickers
        records.append({"type": "rater", "rater": rater, "number": number, "kind": SIMULATED, "study": study.id})
        answered: list[dict[str, str]] = []
        for place, trial in enumerate(trials_of(study, number)):
            prompt = prompts[study.items[trial.item].prompt]
            answers = {}
            for index, question in enumerate(QUESTIONS):
                if is_clicker:
                    answers[question] = str(rng.choice(ANSWERS))
                elif trial.catch is not None:
                    answers[question] = _catch_answer(study, trial, crowd, rng)
                else:
                    taste = rater_taste[index] + prompt_taste[prompt, index]
                    answers[question] = _answer(study, trial, crowd, taste, rng)
            answered.append(answers)
            records.append(_record(rater, place, trial, answers))
    return records


def _tastes(rng: np.random.Generator, shape: tuple[int, ...], num_arms: int) -> np.ndarray:
    """Return N(0, 1) tastes, (*shape, A, A), antisymmetric in the last two."""
    upper = np.triu(rng.standard_normal((*shape, num_arms, num_arms)), 1)
    tastes: np.ndarray = upper - np.swapaxes(upper, -1, -2)
    return tastes


def _answer(study: Study, trial: Trial, crowd: Crowd, taste: np.ndarray, rng: np.random.Generator) -> str:
    if rng.random() < crowd.tie_share:
        return str(rng.choice(("same", "bad")))
    left, right = study.arms.index(trial.left), study.arms.index(trial.right)
    edge = crowd.strengths[trial.left] - crowd.strengths[trial.right] + taste[left, right] + crowd.side_bias
    return "left" if rng.random() < _logistic(edge) else "right"


def _catch_answer(study: Study, trial: Trial, crowd: Crowd, rng: np.random.Generator) -> str:
    expected = right_answer(study, trial)
    assert expected is not None
    return expected[1] if rng.random() < crowd.attention else str(rng.choice(ANSWERS))


def _logistic(logit: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-logit))


def _record(rater: str, number: int, trial: Trial, answers: dict[str, str]) -> dict[str, Any]:
    shown = {"item": trial.item, "left": trial.left, "right": trial.right, "catch": trial.catch}
    shown["repeat_of"] = trial.repeat_of
    return {"type": "answer", "rater": rater, "trial": number, **shown, "answers": answers, "plays": [1, 1]}
