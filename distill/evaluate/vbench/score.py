"""VBench's totals from raw scores: normalise, weigh, refuse what is missing; needs no model and no video."""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line
from codmd_serve.textfiles import decode_text, parse_json, read_text, shown
from distill.evaluate.stats import NUM_RESAMPLES, resample_counts
from distill.evaluate.vbench.facts import (
    DIMENSIONS,
    FLICKER,
    MISPRINTS,
    QUALITY,
    QUALITY_WEIGHT,
    SAMPLES,
    SEMANTIC,
    SEMANTIC_WEIGHT,
    SKIPS_VIDEOS,
    Preset,
    missing_dimensions,
)
from distill.evaluate.vbench.manifest import case_collisions, refuse_case_collisions
from distill.evaluate.vbench.results import DimensionResult, VideoScore, check_raw, clustered, read_results, strata
from distill.evaluate.vbench.run import read_evaluation

PUBLISHED = Path(__file__).with_name("published.csv")
AGREEMENT = 0.01
"""Points by which published totals may differ from ours: their raw scores are rounded to two decimals."""
TOTALS = (QUALITY, SEMANTIC, "total")


@dataclass(frozen=True, slots=True)
class Row:
    """A score of the report, in percent.

    Attributes:
        name: a dimension, or quality, semantic, total, mean.
        value: in percent.
        low, high: 95% interval over prompts; nan when the scores of single videos are not known.
    """

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan


def totals(raw: Mapping[str, float]) -> dict[str, float]:
    """Return quality, semantic and total in percent, of all 16 raw scores in [0, 1].

    Source: Vchitect/VBench scripts/cal_final_score.py, which fills a missing dimension with 0; this refuses it.

    Raises:
        ConfigError: dimensions that are missing, or a score that is none.
    """
    missing = missing_dimensions(set(raw), tuple(DIMENSIONS))
    if missing:
        raise ConfigError(f"no totals without {len(missing)} of 16 dimensions: {', '.join(missing)}")
    for name in DIMENSIONS:
        check_raw(raw[name], name)
    groups = {group: _group_mean(raw, group) for group in (QUALITY, SEMANTIC)}
    total = QUALITY_WEIGHT * groups[QUALITY] + SEMANTIC_WEIGHT * groups[SEMANTIC]
    return {**groups, "total": total / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)}


def _group_mean(raw: Mapping[str, Any], group: str) -> Any:
    members = [dimension for dimension in DIMENSIONS.values() if dimension.group == group]
    weights = sum(dimension.weight for dimension in members)
    return 100.0 * sum(member.weight * member.normalise(raw[member.name]) for member in members) / weights


def summary(results: Mapping[str, DimensionResult], preset: Preset, *, is_partial: bool, seed: int = 0) -> list[Row]:
    """Return the rows of a report: the dimensions, then what the preset makes of all of them.

    Args:
        results: by dimension.
        preset: says which dimensions are wanted, and whether there are totals.
        is_partial: return the dimensions that are there, without totals, in place of refusing the rest.
        seed: of the bootstrap over prompts.

    Raises:
        ConfigError: dimensions that are missing.
    """
    missing = missing_dimensions(set(results), preset.dimensions)
    if missing and not is_partial:
        raise ConfigError(
            f"{len(missing)} of {len(preset.dimensions)} dimensions are missing: {', '.join(missing)}; score them, "
            "or say --partial for a table without totals"
        )
    names = [name for name in preset.dimensions if name in results]
    if not names:
        raise ConfigError(f"none of the dimensions of the preset {preset.name} is there: {', '.join(missing)}")
    draws = bootstrap(results, seed)
    rows = [_row(name, 100.0 * results[name].raw, draws[name] * 100.0 if name in draws else None) for name in names]
    if missing:
        return rows
    raw = {name: results[name].raw for name in names}
    all_draws = draws if set(names) <= draws.keys() else None
    if preset.has_totals:
        means = totals(raw)
        drawn = None if all_draws is None else total_draws(all_draws)
        return rows + [_row(name, means[name], None if drawn is None else drawn[name]) for name in TOTALS]
    mean = 100.0 * sum(raw.values()) / len(raw)
    mean_draws = None if all_draws is None else 100.0 * np.mean([all_draws[name] for name in names], axis=0)
    return [*rows, _row("mean", mean, mean_draws)]


def bootstrap(results: Mapping[str, DimensionResult], seed: int) -> dict[str, np.ndarray]:
    """Return (R,) resampled raw scores of every dimension whose videos are known.

    Prompts are resampled, not videos, within the groups of prompts that share their dimensions, and the same draw
    serves every dimension, so totals have the right spread.
    """
    known = {name: result for name, result in results.items() if result.videos}
    weights = prompt_weights(strata(known), seed)
    draws = {}
    for name, sums in clustered(known).items():
        point, around = resampled_mean(sums, weights)
        # Means over frames may differ from means over videos; the interval is put around what the evaluator gave.
        draws[name] = around + (known[name].raw - point)
    return draws


def prompt_weights(groups: Mapping[str, str], seed: int) -> dict[str, np.ndarray]:
    """Return how often each resample draws each prompt, (R,) by prompt; prompts are drawn within their group."""
    weights: dict[str, np.ndarray] = {}
    for number, group in enumerate(sorted(set(groups.values()))):
        members = sorted(prompt for prompt, own in groups.items() if own == group)
        counts = resample_counts(len(members), seed * 1000 + number)
        weights.update({prompt: counts[:, place] for place, prompt in enumerate(members)})
    return weights


def resampled_mean(
    sums: Mapping[str, tuple[float, int]], weights: Mapping[str, np.ndarray]
) -> tuple[float, np.ndarray]:
    """Return the mean over videos of the sums and numbers by prompt, and its (R,) resamples."""
    top, bottom = np.zeros(NUM_RESAMPLES), np.zeros(NUM_RESAMPLES)
    for prompt, (total, number) in sums.items():
        top += weights[prompt] * total
        bottom += weights[prompt] * number
    point = sum(total for total, _ in sums.values()) / sum(number for _, number in sums.values())
    # A resample may hold no prompt whose videos count.
    return point, np.divide(top, bottom, out=np.full(NUM_RESAMPLES, point), where=bottom > 0)


def total_draws(draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return (R,) resampled quality, semantic and total in percent."""
    groups = {group: _group_mean(draws, group) for group in (QUALITY, SEMANTIC)}
    total = QUALITY_WEIGHT * groups[QUALITY] + SEMANTIC_WEIGHT * groups[SEMANTIC]
    return {**groups, "total": total / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)}


def _row(name: str, value: float, draws: np.ndarray | None) -> Row:
    if draws is None:
        return Row(name, value)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Row(name, value, float(low), float(high))


def read_scores(paths: list[Path], *, failed_as_zero: bool = False) -> dict[str, DimensionResult]:
    """Read scores from folders of `run`, and from VBench's *_eval_results.json files, zips or folders of them.

    Args:
        paths: read in order.
        failed_as_zero: count videos that VBench's files lack as 0, in place of refusing the file.

    Raises:
        ConfigError: nothing to read, a dimension with two values, files that differ only in case, scores that are
            none, or fewer videos than VBench's suite has.
    """
    found: dict[str, DimensionResult] = {}
    sources: dict[str, str] = {}
    for path in paths:
        for where, results in _read(path, failed_as_zero):
            for name, result in results.items():
                if name in found and found[name].raw != result.raw:
                    raise ConfigError(
                        f"{name} is {found[name].raw:.6f} in {sources[name]} and {result.raw:.6f} in {where}: "
                        "give one of them"
                    )
                found[name], sources[name] = result, where
    return found


def _read(path: Path, failed_as_zero: bool) -> list[tuple[str, dict[str, DimensionResult]]]:
    if path.is_dir():
        files = sorted(path.rglob("*_eval_results.json"))
        if not files:
            return [(str(path), read_results(path))]
        refuse_case_collisions([str(file.relative_to(path)) for file in files], str(path))
        texts = [(str(file), read_text(file, ConfigError)) for file in files]
    elif path.suffix == ".zip":
        texts = _zip_texts(path)
    else:
        texts = [(str(path), read_text(path, ConfigError))]
    return [(where, _from_vbench(parse_json(text, where, ConfigError), where, failed_as_zero)) for where, text in texts]


def _zip_texts(path: Path) -> list[tuple[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("_eval_results.json")]
            names = [name for name in names if not name.rpartition("/")[2].startswith(".")]
            if case_collisions(names):
                refuse_case_collisions(names, str(path))
            texts = [(f"{path}: {name}", archive.read(name)) for name in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read as a zip: {first_line(error)}") from error
    if not texts:
        raise ConfigError(f"{path} holds no *_eval_results.json")
    return [(where, decode_text(data, where, ConfigError)) for where, data in texts]


def _from_vbench(data: Any, where: str, failed_as_zero: bool) -> dict[str, DimensionResult]:
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"{where} must hold one object of dimensions, as VBench's *_eval_results.json does")
    unknown = [name for name in data if name.replace(" ", "_") not in DIMENSIONS]
    if unknown:
        raise ConfigError(f"{where}: {shown(unknown[0])} is no dimension of VBench; those are {', '.join(DIMENSIONS)}")
    named = {name.replace(" ", "_"): value for name, value in data.items()}
    return {name: _one_from_vbench(named, name, where, failed_as_zero) for name in named}


def _one_from_vbench(data: dict[str, Any], name: str, where: str, failed_as_zero: bool) -> DimensionResult:
    raw, scores = read_evaluation(data, name, where)
    if not scores:
        note = "the scores of single videos are not known: no interval, and nothing says that none is missing"
        return DimensionResult(dimension=name, raw=raw, evaluator_raw=raw, notes=[note])
    expected = SAMPLES * DIMENSIONS[name].num_prompts
    lacking = 0 if name in SKIPS_VIDEOS else expected - len(scores)
    if lacking < 0 or (lacking and not failed_as_zero):
        raise ConfigError(
            f"{where}: {name} has {len(scores)} videos, VBench's suite has {expected}: a mean over the rest would "
            "leave out failures; --failed-as-zero counts what is lacking as 0"
        )
    videos = [_named_video(path, score, name) for path, score in scores.items()]
    videos += [
        VideoScore(prompt=f"lacking {number}", sample=0, group=name, score=None, reason="not in the file")
        for number in range(lacking)
    ]
    notes = [f"{lacking} of {expected} videos are lacking and count as 0"] if lacking else []
    if name == FLICKER:
        notes.append("whether VBench's static filter was applied is not known")
    return DimensionResult(
        dimension=name,
        raw=raw * len(scores) / (len(scores) + lacking),
        evaluator_raw=raw,
        videos=videos,
        num_videos=len(videos),
        num_failed=lacking,
        notes=notes,
    )


def _named_video(path: str, score: float, dimension: str) -> VideoScore:
    """Read prompt and sample back from a name `{prompt}-{sample}.mp4`."""
    prompt, _, sample = path.replace("\\", "/").rpartition("/")[2].rpartition(".")[0].rpartition("-")
    if not prompt or not sample.isdecimal():
        raise ConfigError(f"{dimension}: expected a video named prompt-0.mp4, got {shown(path)}")
    return VideoScore(prompt=prompt, sample=int(sample), group=dimension, score=score)


@dataclass(frozen=True, slots=True)
class Agreement:
    """A published total beside ours of the same row.

    Attributes:
        model: of the row.
        name: quality, semantic or total.
        published, ours: in percent.
        misprint: why the published value is wrong; empty where it is not known to be.
    """

    model: str
    name: str
    published: float
    ours: float
    misprint: str

    @property
    def agrees(self) -> bool:
        """Whether both are equal up to the rounding of the published raw scores."""
        return abs(self.published - self.ours) <= AGREEMENT


def agreement(path: Path = PUBLISHED) -> list[Agreement]:
    """Recompute the totals of published rows: CSV with the model, 16 raw scores and three totals, all in percent.

    Raises:
        ConfigError: a column is missing, or a cell is not a number.
    """
    rows = list(csv.DictReader(io.StringIO(read_text(path, ConfigError))))
    if not rows:
        raise ConfigError(f"{path} has no rows")
    found = []
    for number, row in enumerate(rows, start=2):
        try:
            raw = {name: float(row[name]) / 100.0 for name in DIMENSIONS}
            published = {name: float(row[name]) for name in TOTALS}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}, line {number}: {first_line(error)}") from error
        ours = totals(raw)
        model = row.get("model") or f"line {number}"
        found += [
            Agreement(model, name, published[name], ours[name], MISPRINTS.get((model, name), "")) for name in TOTALS
        ]
    return found
