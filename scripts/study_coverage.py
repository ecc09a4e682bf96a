"""Simulate many blind studies and count how often the 95 % interval of `eval study analyse` holds the planted win rate.

    .venv/bin/python scripts/study_coverage.py --studies 1000

Prints a Markdown table: settings from raters who all agree to raters and prompts of very different taste.
Simulated raters; says nothing about any model.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distill.evaluate.study.analysis import counting_votes, pair_result
from distill.evaluate.study.simulate import Crowd, simulate, simulated_study
from distill.evaluate.study.votes import read_votes

STRENGTHS = {"a": 0.5, "b": 0.0}


@dataclass(frozen=True, slots=True)
class Setting:
    """Size of a study and spread of tastes, in logits."""

    num_raters: int
    num_prompts: int
    rater_sd: float
    prompt_sd: float


SETTINGS = (
    Setting(5, 20, 0.0, 0.0),
    Setting(5, 20, 0.5, 0.5),
    Setting(5, 20, 1.0, 1.0),
    Setting(12, 24, 0.0, 0.0),
    Setting(12, 24, 0.5, 0.5),
    Setting(12, 24, 1.0, 0.5),
    Setting(20, 40, 0.3, 0.6),
    Setting(20, 40, 1.0, 1.0),
)


def coverage(setting: Setting, num_studies: int, num_draws: int = 400) -> tuple[float, float]:
    """Return the share of studies whose interval holds the planted win rate, and the mean half width."""
    inside, widths = [], []
    for low, high, planted in intervals(setting, num_studies, num_draws):
        inside.append(low <= planted <= high)
        widths.append((high - low) / 2)
    return float(np.mean(inside)), float(np.mean(widths))


def intervals(setting: Setting, num_studies: int, num_draws: int) -> Iterator[tuple[float, float, float]]:
    """Yield low, high and the planted win rate of every simulated study."""
    for seed in range(num_studies):
        study = simulated_study(list(STRENGTHS), setting.num_prompts, num_catches=0, seed=seed)
        crowd = Crowd(
            strengths=STRENGTHS,
            num_raters=setting.num_raters,
            rater_sd=setting.rater_sd,
            prompt_sd=setting.prompt_sd,
            side_bias=0.3,
            seed=seed,
        )
        raters, _ = read_votes(study, simulate(study, crowd))
        result = pair_result(study, counting_votes(raters), "a", "b", "overall", seed=seed, num_draws=num_draws)
        yield result.win_rate.low, result.win_rate.high, crowd.win_rate("a", "b")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--studies", type=int, default=1000, help="of each setting (default 1000)")
    options = parser.parse_args()
    print(f"Simulated raters, {options.studies} studies a row; nominal coverage 95 %.\n")
    print(
        "| raters | prompts | spread of raters | spread of prompts | coverage | half width |\n|---|---|---|---|---|---|"
    )
    for setting in SETTINGS:
        share, width = coverage(setting, options.studies)
        print(
            f"| {setting.num_raters} | {setting.num_prompts} | {setting.rater_sd} | {setting.prompt_sd} | "
            f"{100 * share:.1f} % | {100 * width:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
