"""Clips of a few arms side by side, where the cells of a comparison have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from codmd_serve.errors import ConfigError
from distill.evaluate.compare.results import Setting
from distill.evaluate.compare.roles import main_arms, truth_of
from distill.evaluate.compare.table import TEACHER

MAX_CAPTIONS = 3
WIDTH_INCHES = 4.6


def clip_arms(setting: Setting) -> list[str]:
    """Return the arms that have clips: truth, teachers, then the trained ones."""
    table = setting.comparison.table
    teachers = [arm for arm, entry in table["arms"].items() if entry.get("kind") == TEACHER]
    wanted = [truth_of(table), *teachers, *main_arms(table)]
    return [arm for arm in wanted if arm in table["arms"] and clips_of(setting, arm)]


def clips_of(setting: Setting, arm: str) -> list[Mapping[str, Any]]:
    """Return the clips of an arm's first seed: `caption`, and `strip`, a picture relative to the JSON."""
    cell = setting.cell(arm, setting.comparison.table["seeds"][0])
    return list(cell.get("clips", []))[:MAX_CAPTIONS]


def clips(setting: Setting) -> Figure:
    """Draw frames of the same captions and the same noise: a column for each caption, a row for each arm.

    Raises:
        ConfigError: a strip is missing, no picture, or outside the folder of the JSON.
    """
    arms = clip_arms(setting)
    captions = list(dict.fromkeys(clip["caption"] for arm in arms for clip in clips_of(setting, arm)))
    strips = {(arm, clip["caption"]): open_strip(setting, clip) for arm in arms for clip in clips_of(setting, arm)}
    shape = max(strip.height / strip.width for strip in strips.values())
    height = 0.5 + len(arms) * (WIDTH_INCHES * shape + 0.04)
    figure = Figure(figsize=(1.3 + WIDTH_INCHES * len(captions), height), layout="constrained")
    axes = figure.subplots(len(arms), len(captions), squeeze=False)
    for row, arm in enumerate(arms):
        for column, caption in enumerate(captions):
            panel = axes[row][column]
            if (arm, caption) in strips:
                panel.imshow(strips[arm, caption])
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
        axes[row][0].set_ylabel(arm, fontsize=8, rotation=0, ha="right", va="center")
    for column, caption in enumerate(captions):
        axes[0][column].set_title(caption, fontsize=8, wrap=True)
    return figure


def open_strip(setting: Setting, clip: Mapping[str, Any]) -> Image.Image:
    """Return the picture of a clip.

    Raises:
        ConfigError: as `clips`.
    """
    folder = setting.comparison.folder.resolve()
    path = (folder / clip["strip"]).resolve()
    if not path.is_relative_to(folder):
        raise ConfigError(f"the clip {clip['strip']} is outside the folder of its JSON")
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError) as problem:
        raise ConfigError(f"the clip {path} cannot be read: {problem}") from problem
