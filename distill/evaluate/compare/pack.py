"""Cuts the JSON of a comparison down to what a report uses, so that it can be tracked; the report stays the same."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from codmd_serve.files import atomic_file, write_bytes
from distill.evaluate.compare.clips import clip_arms, clips_of, open_strip
from distill.evaluate.compare.matrices import matrix_arms, matrix_names
from distill.evaluate.compare.plots import SHOWN_STEPS, step_arms
from distill.evaluate.compare.report import SHOWN
from distill.evaluate.compare.results import Comparison

DIGITS, MATRIX_DECIMALS, STRIP_COLOURS = 6, 3, 64
KEPT_KEYS = ("arm", "guidance", "budget", "seed", "student_updates", "calls", "cpu_s")
SUFFIX = ".json.gz"


def pack(own: Comparison, folder: Path) -> Path:
    """Write NAME.json.gz, and NAME-clips/ where cells have clips.

    Returns:
        The file.

    Raises:
        ConfigError: a clip cannot be read.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clips = _pack_clips(own, folder)
    cells = [_packed(own, cell, clips) for cell in own.data["cells"]]
    data = {"format": own.data["format"], "table": own.table, "cells": cells}
    path = folder / f"{own.table['name']}{SUFFIX}"
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # Without a time in the header the same results are the same bytes.
    write_bytes(path, gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
    return path


def _packed(own: Comparison, cell: Mapping[str, Any], clips: Mapping[str, list[dict[str, str]]]) -> dict[str, Any]:
    table = own.table
    last = next((entry for entry in own.last_settings if entry.guidance == float(cell["guidance"])), None)
    is_last = last is not None and cell["budget"] == last.budget
    names = [*table["metrics"], *(name for name in (*SHOWN, *SHOWN_STEPS) if name not in table["metrics"])]
    steps = cell["steps"] if is_last and cell["arm"] in step_arms(table) else cell["steps"][-1:]
    found = {key: cell[key] for key in KEPT_KEYS}
    found["steps"] = [{name: _rounded(step[name]) for name in dict.fromkeys(names) if name in step} for step in steps]
    if last is not None and is_last and matrix_names(last) and cell["arm"] in matrix_arms(last):
        found["matrices"] = {
            name: [[round(value, MATRIX_DECIMALS) for value in row] for row in rows]
            for name, rows in cell["matrices"].items()
        }
    key = _clip_key(cell)
    return {**found, "clips": clips[key]} if key in clips else found


def _pack_clips(own: Comparison, folder: Path) -> dict[str, list[dict[str, str]]]:
    """Write the strips that the report shows, in few colours; return them by cell."""
    found = dict[str, list[dict[str, str]]]()
    for last in own.last_settings:
        for arm in clip_arms(last):
            target = folder / f"{last.place}-clips"
            target.mkdir(exist_ok=True)
            kept = []
            for place, clip in enumerate(clips_of(last, arm)):
                path = target / f"{arm}-{place}.png"
                with atomic_file(path) as temporary:
                    picture = open_strip(last, clip).quantize(
                        STRIP_COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
                    )
                    buffer = io.BytesIO()
                    picture.save(buffer, format="PNG", optimize=True)
                    temporary.write_bytes(buffer.getvalue())
                kept.append({"caption": clip["caption"], "strip": str(path.relative_to(folder).as_posix())})
            found[_clip_key(last.cell(arm, own.table["seeds"][0]))] = kept
    return found


def _clip_key(cell: Mapping[str, Any]) -> str:
    return f"{cell['arm']} {cell['guidance']} {cell['budget']} {cell['seed']}"


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
