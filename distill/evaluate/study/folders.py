"""Finds the videos of every arm and says everything that is wrong with them, in one list.

Knows nothing of raters. An arm is a folder of videos; the same file name, without the suffix, is the same prompt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from codmd_serve.errors import ConfigError
from codmd_serve.prompts import clean_prompt, is_blank
from codmd_serve.textfiles import parse_json, read_text, shown, split_lines
from distill.evaluate.study.design import Item
from distill.evaluate.study.media import SUFFIXES, Clip, UnplayableError, inspect_clip

MAX_FPS_RATIO = 1.001


@dataclass(frozen=True, slots=True)
class ArmVideo:
    """One video of one arm."""

    path: Path
    clip: Clip


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What the arms made of the same prompts.

    Attributes:
        items: in the order of their names.
        videos: by arm and name of the item; every arm has every item.
        problems: all that is wrong, a sentence each; when there are any, nothing else here counts.
    """

    items: tuple[Item, ...]
    videos: dict[str, dict[str, ArmVideo]]
    problems: tuple[str, ...]


def read_prompt_items(path: Path, seeds_per_prompt: int = 1) -> tuple[Item, ...]:
    """Read the prompts of a study: a .json object of file names and prompts, or a text file with one prompt a line.

    Args:
        path: of the file. Lines are called 0000, 0001, ...; blank ones do not count.
        seeds_per_prompt: videos of each prompt; with more than one, names end in -0, -1, ...

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or a blank one.
    """
    text = read_text(path, ConfigError)
    if path.suffix.lower() == ".json":
        data = parse_json(text, str(path), ConfigError)
        if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
            raise ConfigError(f"{path} must hold one JSON object of file names and prompts, got {shown(data)}")
        entries = {Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name: data[name] for name in data}
        for name, prompt in entries.items():
            if not name or name.startswith(".") or "/" in name or "\0" in name or len(os.fsencode(name)) > 240:
                raise ConfigError(f"{path}: {shown(name)} cannot be the name of a file")
            if is_blank(prompt):
                raise ConfigError(f"{path}: the prompt of {shown(name)} is blank")
    else:
        lines = [line for line in split_lines(text) if not is_blank(line)]
        entries = {f"{number:04d}": line for number, line in enumerate(lines)}
    if not entries:
        raise ConfigError(f"{path} holds no prompt")
    if seeds_per_prompt > 1:
        entries = {f"{name}-{seed}": prompt for name, prompt in entries.items() for seed in range(seeds_per_prompt)}
    return tuple(Item(name, clean_prompt(prompt)) for name, prompt in sorted(entries.items()))


def compare_arms(
    folders: dict[str, Path], items: tuple[Item, ...] | None = None, on_video: Callable[[], object] | None = None
) -> Comparison:
    """Look at every video of every arm.

    Args:
        folders: by name of the arm.
        items: of a prompt file; None takes the prompts from the file names, as `a red circle-0.mp4`.
        on_video: called when a video was looked at.
    """
    problems: list[str] = []
    if len(folders) < 2:
        problems.append(f"a study compares two arms or more, got {len(folders)}: {', '.join(folders) or 'none'}")
    files = {arm: _files_by_name(arm, folder, problems) for arm, folder in folders.items()}
    problems += _same_folders(folders)
    names = {item.name for item in items} if items is not None else set().union(*files.values())
    problems += _missing(files, names, with_prompts=items is not None)
    videos = _inspect(files, problems, on_video)
    problems += _duplicates(videos)
    problems += _unequal(videos, sorted(names))
    if items is None:
        items = tuple(Item(name, _prompt_of_name(name)) for name in sorted(names))
    problems += [f"the file name {shown(item.name)} holds no prompt" for item in items if is_blank(item.prompt)]
    return Comparison(items=items, videos=videos, problems=tuple(problems))


def _prompt_of_name(name: str) -> str:
    """Return the prompt of a file name, without the number of the sample at its end."""
    return clean_prompt(re.sub(r"-\d+$", "", name))


def _files_by_name(arm: str, folder: Path, problems: list[str]) -> dict[str, Path]:
    if not folder.is_dir():
        problems.append(f"{arm}: there is no folder {folder}")
        return {}
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        problems.append(f"{arm}: the folder {folder} cannot be read: {error.strerror}")
        return {}
    files: dict[str, Path] = {}
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.stem in files:
            problems.append(f"{arm}: {files[path.stem].name} and {path.name} are two videos of one prompt")
        files.setdefault(path.stem, path)
    if not files:
        problems.append(f"{arm}: the folder {folder} holds no video ({', '.join(SUFFIXES)})")
    return files


def _same_folders(folders: dict[str, Path]) -> list[str]:
    seen: dict[str, str] = {}
    problems = []
    for arm, folder in folders.items():
        real = os.path.realpath(folder)
        if real in seen:
            problems.append(f"{seen[real]} and {arm} are the same folder {folder}")
        seen.setdefault(real, arm)
    return problems


def _missing(files: dict[str, dict[str, Path]], names: set[str], *, with_prompts: bool) -> list[str]:
    problems = []
    for arm, found in files.items():
        if not found:
            continue  # its folder is in the list already
        problems += [f"{arm}: no video of {shown(name)}" for name in sorted(names - set(found))]
        if with_prompts:
            problems += [f"{arm}: {found[name].name} has no prompt" for name in sorted(set(found) - names)]
    return problems


def _inspect(
    files: dict[str, dict[str, Path]], problems: list[str], on_video: Callable[[], object] | None
) -> dict[str, dict[str, ArmVideo]]:
    def look(path: Path) -> Clip | str:
        try:
            return inspect_clip(path)
        except UnplayableError as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)

    videos: dict[str, dict[str, ArmVideo]] = {arm: {} for arm in files}
    every = [(arm, name, path) for arm, found in files.items() for name, path in found.items()]
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        for (arm, name, path), seen in zip(every, pool.map(look, (path for _, _, path in every)), strict=True):
            if isinstance(seen, str):
                problems.append(f"{arm}: {path.name} cannot be played: {seen}")
            else:
                videos[arm][name] = ArmVideo(path, seen)
            if on_video is not None:
                on_video()
    return videos


def _duplicates(videos: dict[str, dict[str, ArmVideo]]) -> list[str]:
    seen: dict[str, str] = {}
    problems = []
    for arm, found in videos.items():
        for video in found.values():
            where = f"{arm}/{video.path.name}"
            if video.clip.digest in seen:
                problems.append(f"{seen[video.clip.digest]} and {where} show the same pictures")
            seen.setdefault(video.clip.digest, where)
    return problems


def _unequal(videos: dict[str, dict[str, ArmVideo]], names: list[str]) -> list[str]:
    problems = []
    for name in names:
        clips = [(arm, found[name].clip) for arm, found in videos.items() if name in found]
        for arm, clip in clips[1:]:
            if not _are_alike(clips[0][1], clip):
                problems.append(f"{shown(name)} is unequal: {clips[0][0]} has {clips[0][1]}, {arm} has {clip}")
    return problems


def _are_alike(first: Clip, second: Clip) -> bool:
    shapes = [(clip.width, clip.height, clip.num_frames) for clip in (first, second)]
    ratio = first.fps / second.fps
    return shapes[0] == shapes[1] and 1 / MAX_FPS_RATIO <= ratio <= MAX_FPS_RATIO
