"""Scores a plan's videos with the `vbench` package, one process for each dimension; what is scored is kept.

The package pins an old transformers and numpy, so it lives in an environment of its own (`make vbench-env`). One
process for each dimension, on one device: VBench's own distribution over GPUs changes some of its numbers.
"""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codmd_serve.errors import CodmdError, ConfigError
from codmd_serve.files import write_json
from codmd_serve.textfiles import read_json_object, shown
from codmd_serve.video import cause_of
from distill.evaluate.vbench.check import Verdicts, check_videos, listed
from distill.evaluate.vbench.facts import FLICKER, PER_VIDEO_PERCENT, SAMPLES, SKIPS_VIDEOS
from distill.evaluate.vbench.generate import VIDEOS_NAME
from distill.evaluate.vbench.manifest import Plan, PlannedPrompt, Video, read_plan
from distill.evaluate.vbench.results import (
    NOT_COUNTED,
    RESULTS_NAME,
    DimensionResult,
    VideoScore,
    check_raw,
    read_result,
    write_result,
)
from distill.evaluate.vbench.suite import ENVIRONMENT

RUNNER = Path(__file__).with_name("runner.py")
READS_FILE_NAME = "human_action"
UNFILTERED = (
    "without VBench's static filter, which needs RAFT: moving videos are scored too, so this is not comparable with "
    "published temporal flickering"
)

logger = logging.getLogger(__name__)

Chosen = list[tuple[PlannedPrompt, list[Video]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """How to score.

    Attributes:
        python: of the environment that has vbench.
        device: cpu, cuda or cuda:N, as torch in that environment names it.
        dimensions: empty is all of the plan.
        static_filter: VBench's filtered_static_video.json; None scores unfiltered videos and says so.
        failed_as_zero: go on where videos failed or are damaged, and count them as 0.
    """

    python: Path = ENVIRONMENT / "bin" / "python"
    device: str = "cpu"
    dimensions: tuple[str, ...] = ()
    static_filter: Path | None = None
    failed_as_zero: bool = False


def run(folder: Path, settings: RunSettings) -> dict[str, DimensionResult]:
    """Score the dimensions of a plan that have no result yet.

    Raises:
        ConfigError: no plan, environment or videos; or videos that are missing or bad, with the list.
        CodmdError: evaluators failed; the results of the others are written.
    """
    plan = read_plan(folder)
    wanted = [name for name in plan.dimensions if not settings.dimensions or name in settings.dimensions]
    unplanned = [name for name in settings.dimensions if name not in plan.dimensions]
    if unplanned:
        raise ConfigError(f"the plan has no {', '.join(unplanned)}; it has {', '.join(plan.dimensions)}")
    check_environment(settings.python)
    static = _static_files(settings.static_filter, plan)
    chosen = {name: _chosen(plan, name, static) for name in wanted}
    needed = {video.file for pairs in chosen.values() for _, videos in pairs for video in videos}
    verdicts = check_videos(folder, plan, sorted(needed))
    refuse_bad(verdicts, settings.failed_as_zero)
    results_folder = folder / RESULTS_NAME
    results_folder.mkdir(exist_ok=True)
    results, problems = {}, {}
    for name in wanted:
        path = results_folder / f"{name}.json"
        if path.is_file() and read_result(path).plan_sha256 == plan.sha256:
            results[name] = read_result(path)
            logger.info("dimension=%s status=kept raw=%.6f", name, results[name].raw)
            continue
        try:
            results[name] = _score(folder, plan, name, chosen[name], verdicts, settings, static is not None)
            write_result(results_folder, results[name])
            logger.info("dimension=%s status=scored raw=%.6f", name, results[name].raw)
        except CodmdError as error:
            problems[name] = str(error)
            logger.warning("dimension=%s status=failed", name)
    if problems:
        raise CodmdError("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
    return results


def check_environment(python: Path) -> None:
    """Refuse a Python that has no vbench.

    Raises:
        ConfigError: says how to make the environment.
    """
    how = "`make vbench-env` makes build/vbench-env; another one is named with --python"
    if not python.is_file():
        raise ConfigError(f"no {python}: {how}")
    command = [str(python), "-c", "import importlib.metadata as m; print(m.version('vbench'))"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python} cannot be run: {error}; {how}") from error
    if done.returncode:
        raise ConfigError(f"{python} has no vbench: {cause_of(done.stderr)}; {how}")


def refuse_bad(verdicts: Verdicts, failed_as_zero: bool) -> None:
    """Refuse to score an incomplete set of videos.

    Raises:
        ConfigError: with the list.
    """
    never = verdicts.missing or verdicts.twins
    if never or ((verdicts.failed or verdicts.damaged) and not failed_as_zero):
        advice = "`generate` makes them"
        if not never:
            advice += "; --failed-as-zero scores the rest and counts these as 0"
        raise ConfigError(f"{'; '.join(verdicts.lines())}: {advice}")


def _chosen(plan: Plan, dimension: str, static: set[str] | None) -> Chosen:
    """Return the videos that a dimension takes: five of each prompt, of the static ones where they are known."""
    pairs = []
    for prompt in plan.scored_on(dimension):
        videos = prompt.videos
        if dimension == FLICKER and static is not None:
            videos = [video for video in videos if video.file in static]
        pairs.append((prompt, videos[:SAMPLES]))
    bare = [f"{prompt.index:04d}" for prompt, videos in pairs if not videos]
    if bare:
        raise ConfigError(f"no static video of {len(bare)} prompts: {listed(bare)}; plan more --flicker-samples")
    return pairs


def _static_files(path: Path | None, plan: Plan) -> set[str] | None:
    if path is None:
        return None
    names = {video.file for _, video in plan.videos()}
    found: set[str] = set()
    for key, entry in read_json_object(path, ConfigError).items():
        paths = entry.get("static_path") if isinstance(entry, dict) else None
        if not isinstance(paths, list) or not all(isinstance(name, str) for name in paths):
            raise ConfigError(f"{path}: {shown(key)} must hold static_path, a list, as VBench's static_filter writes")
        found |= {re.split(r"[/\\]", name)[-1] for name in paths}
    strangers = sorted(found - names)
    if strangers:
        raise ConfigError(f"{path} names videos that are not of this plan: {listed(strangers)}")
    return found


def _score(
    folder: Path,
    plan: Plan,
    dimension: str,
    chosen: Chosen,
    verdicts: Verdicts,
    settings: RunSettings,
    is_filtered: bool,
) -> DimensionResult:
    bad = {**verdicts.failed, **verdicts.damaged}
    with tempfile.TemporaryDirectory(prefix="codmd-vbench-") as scratch:
        names = _evaluate(folder, dimension, chosen, bad, settings, Path(scratch))
        data = read_json_object(Path(scratch) / "vbench_eval_results.json", CodmdError)
        evaluator = read_json_object(Path(scratch) / "vbench_versions.json", CodmdError)
    raw, scored = read_evaluation(data, dimension, "VBench's answer")
    videos = []
    for prompt, planned in chosen:
        for video in planned:
            score = scored.get(names.get(video.file, ""))
            reason = "" if score is not None else _reason(dimension, video.file, bad)
            group = "+".join(prompt.dimensions)
            videos.append(VideoScore(prompt=prompt.text, sample=video.sample, group=group, score=score, reason=reason))
    counted = [video for video in videos if video.is_counted]
    num_failed = sum(video.score is None for video in counted)
    notes = [UNFILTERED] if dimension == FLICKER and not is_filtered else []
    if not plan.is_official:
        notes.append("not the prompt list of VBench 0.1.5")
    fewest = min(len(planned) for _, planned in chosen)
    if fewest < SAMPLES:
        notes.append(f"{fewest} videos of a prompt or more, where VBench scores {SAMPLES}")
    if num_failed:
        notes.append(f"{num_failed} of {len(counted)} videos failed and count as 0")
    return DimensionResult(
        dimension=dimension,
        raw=raw * (len(counted) - num_failed) / len(counted),
        evaluator_raw=raw,
        videos=videos,
        num_videos=len(counted),
        num_failed=num_failed,
        plan_sha256=plan.sha256,
        evaluator={"device": settings.device, **evaluator},
        notes=notes,
    )


def _reason(dimension: str, file: str, bad: dict[str, str]) -> str:
    if file in bad:
        return bad[file]
    if dimension in SKIPS_VIDEOS:
        return f"{NOT_COUNTED}the evaluator found no object"
    return "the evaluator left it out"


def _evaluate(
    folder: Path, dimension: str, chosen: Chosen, bad: dict[str, str], settings: RunSettings, scratch: Path
) -> dict[str, str]:
    """Run the evaluator; return what it calls each video, by file."""
    names: dict[str, str] = {}
    aliases: dict[str, str] = {}
    info = []
    for prompt, videos in chosen:
        good = [video for video in videos if video.file not in bad]
        for video in good:
            path = str((folder / VIDEOS_NAME / video.file).resolve())
            names[video.file] = path
            if dimension == READS_FILE_NAME:
                # The label is read from this name up to the first "-"; the name is not a path of anything.
                names[video.file] = f"{prompt.text}-{video.file}"
                aliases[names[video.file]] = path
        auxiliary = {dimension: prompt.auxiliary[dimension]} if dimension in prompt.auxiliary else {}
        entry: dict[str, Any] = {"prompt_en": prompt.text, "dimension": [dimension]}
        entry["video_list"] = [names[video.file] for video in good]
        info.append({**entry, "auxiliary_info": auxiliary} if auxiliary else entry)
    if not names:
        raise CodmdError("no video to score")
    request = {
        "dimension": dimension,
        "device": settings.device,
        "info": str(scratch / "info.json"),
        "output": str(scratch),
        "name": "vbench",
        "aliases": aliases,
    }
    write_json(scratch / "info.json", info)
    write_json(scratch / "request.json", request)
    log = folder / RESULTS_NAME / f"{dimension}.log"
    command = [str(settings.python.absolute()), "-u", str(RUNNER), str(scratch / "request.json")]
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, cwd=scratch, check=False)
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
        raise CodmdError(f"the evaluator failed: {said[-1] or done.returncode} (see {log})")
    return names


def read_evaluation(data: dict[str, Any], dimension: str, where: str) -> tuple[float, dict[str, float]]:
    """Read one dimension of VBench's result file.

    Returns:
        The raw score, and the raw score of every video by what VBench calls it; without a list of videos, none.

    Raises:
        ConfigError: not that form, or scores that are NaN or out of range.
    """
    value = data.get(dimension)
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: {dimension} must be a list of the score and the videos, got {shown(value)}")
    raw = check_raw(value[0], f"{where}: {dimension}")
    scores: dict[str, float] = {}
    for entry in value[1] if len(value) > 1 and isinstance(value[1], list) else []:
        try:
            name, score = entry["video_path"], entry["video_results"]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{where}: {dimension}: a video needs video_path and video_results") from error
        # Booleans are the verdicts of dynamic degree and human action.
        number = float(score) if isinstance(score, bool | int | float) else score
        if dimension in PER_VIDEO_PERCENT and isinstance(number, float):
            number /= 100.0
        scores[name] = check_raw(number, f"{where}: {dimension} of {shown(name)}")
    return raw, scores
