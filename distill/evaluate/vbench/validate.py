"""VBench's scores of the videos of a validation: the command that `train` calls between iterations.

The prompts are those of a plan, of one video each; the plan itself stays as it is, its videos are others.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from codmd_serve.errors import ConfigError
from codmd_serve.textfiles import parse_json, read_text
from distill.evaluate.vbench.facts import PRESETS
from distill.evaluate.vbench.generate import VIDEOS_NAME
from distill.evaluate.vbench.manifest import PLAN_NAME, Plan, read_plan
from distill.evaluate.vbench.run import RunSettings, run
from distill.evaluate.vbench.score import summary

SCORED_NAME = "vbench"
MEAN = "mean"


def plan_prompts(folder: Path) -> list[str]:
    """Return what the model is told for each prompt of a plan, in its order.

    Raises:
        ConfigError: no plan, or one with several videos of a prompt.
    """
    plan = read_plan(folder)
    if any(len(prompt.videos) > 1 for prompt in plan.prompts):
        raise ConfigError(f"{folder} plans several videos of a prompt: make it with --samples 1 --flicker-samples 1")
    return [prompt.model_text for prompt in plan.prompts]


def score_validation(folder: Path, videos: Path, prompts: Path, settings: RunSettings) -> dict[str, float]:
    """Score the videos of one validation.

    Args:
        folder: of the plan.
        videos: folder of mp4s.
        prompts: JSON list of {"file", "prompt"}.
        settings: how to score.

    Returns:
        Scores in percent by dimension, and `mean`, of all of them.

    Raises:
        ConfigError: no plan or videos, or a prompt of the plan without a video.
        CodmdError: an evaluator failed.
    """
    texts, plan = plan_prompts(folder), read_plan(folder)
    made = _by_prompt(prompts)
    missing = [text for text in texts if text not in made]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(texts)} prompts of {folder} have no video: set validate.num_prompts={len(texts)}"
        )
    scored = videos / SCORED_NAME
    shutil.rmtree(scored, ignore_errors=True)
    (scored / VIDEOS_NAME).mkdir(parents=True)
    shutil.copyfile(folder / PLAN_NAME, scored / PLAN_NAME)
    _link(plan, made, videos, scored / VIDEOS_NAME)
    rows = summary(run(scored, settings), PRESETS["vbench"], is_partial=True)
    values = {row.name: row.value for row in rows}
    if "total" not in values:
        values[MEAN] = sum(values.values()) / len(values)
    return values


def _by_prompt(path: Path) -> dict[str, str]:
    data: Any = parse_json(read_text(path, ConfigError), str(path), ConfigError)
    try:
        return {str(entry["prompt"]): Path(str(entry["file"])).name for entry in data}
    except (KeyError, TypeError) as error:
        raise ConfigError(f'{path} must be a list of {{"file", "prompt"}}') from error


def _link(plan: Plan, made: dict[str, str], videos: Path, target: Path) -> None:
    """Give the videos the names of the plan."""
    for prompt, video in plan.videos():
        shutil.copyfile(videos / made[prompt.model_text], target / video.file)
