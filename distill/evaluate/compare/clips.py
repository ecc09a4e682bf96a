"""Clips of a few arms side by side, where the cells of a comparison have them: a table of strips of frames."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from codmd_serve.errors import ConfigError
from distill.evaluate.compare.markdown import table
from distill.evaluate.compare.results import Setting
from distill.evaluate.compare.roles import curve_arms, truth_of
from distill.evaluate.compare.table import TEACHER

MAX_CAPTIONS = 2


def clip_arms(setting: Setting) -> list[str]:
    """Return the arms whose clips are shown: truth, teachers, then the few trained ones that plots of lines hold."""
    own = setting.comparison.table
    teachers = [arm for arm, entry in own["arms"].items() if entry.get("kind") == TEACHER]
    wanted = [truth_of(own), *teachers, *curve_arms(own)]
    return [arm for arm in wanted if arm in own["arms"] and clips_of(setting, arm)]


def clips_of(setting: Setting, arm: str) -> list[Mapping[str, Any]]:
    """Return the clips of an arm's first seed: `caption`, and `strip`, a picture relative to the JSON."""
    cell = setting.cell(arm, setting.comparison.table["seeds"][0])
    return list(cell.get("clips", []))[:MAX_CAPTIONS]


def clip_table(setting: Setting, page: Path) -> str:
    """Return a row for each arm and a column for each caption; strips are named relative to the page's folder."""
    arms = clip_arms(setting)
    captions = list(dict.fromkeys(clip["caption"] for arm in arms for clip in clips_of(setting, arm)))
    rows = []
    for arm in arms:
        strips = {clip["caption"]: strip_path(setting, clip) for clip in clips_of(setting, arm)}
        names = {caption: Path(os.path.relpath(path, page.parent)).as_posix() for caption, path in strips.items()}
        rows.append([arm, *(f"![{arm}]({names[caption]})" if caption in names else "" for caption in captions)])
    return table(["", *captions], rows)


def strip_path(setting: Setting, clip: Mapping[str, Any]) -> Path:
    """Return the file of a clip.

    Raises:
        ConfigError: it is outside the folder of the JSON.
    """
    folder = setting.comparison.folder
    path = folder / str(clip["strip"])
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"the clip {clip['strip']} is outside the folder of its JSON")
    return path


def open_strip(setting: Setting, clip: Mapping[str, Any]) -> Image.Image:
    """Return the picture of a clip.

    Raises:
        ConfigError: missing, no picture, or outside the folder of the JSON.
    """
    path = strip_path(setting, clip)
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError) as problem:
        raise ConfigError(f"the clip {path} cannot be read: {problem}") from problem
