"""Makes the planned videos with the engine that serves; what exists is kept, so a killed run goes on where it was.

It writes beside the videos what made them (generation.json) and one line for each try (generated.jsonl). A video that
fails is recorded and tried again by the next call; it never leaves the plan.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from codmd_serve.config import DEFAULT_CRF, GenerateParams, ModelFacts
from codmd_serve.errors import ConfigError, GenerationError
from codmd_serve.files import first_line, write_json
from codmd_serve.textfiles import read_json_object, shown
from distill.evaluate.vbench.manifest import Plan, PlannedPrompt, Video, read_plan

VIDEOS_NAME = "videos"
GENERATION_NAME = "generation.json"
LEDGER_NAME = "generated.jsonl"
MAX_FAILURES_IN_A_ROW = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSettings:
    """What to make the videos with.

    Attributes:
        bundle: of the student.
        height, width, num_frames, fps: None is what the bundle was trained at.
        crf: of the H.264 encoder.
        shard: (k, n): make every n-th prompt from the k-th, counted from 1; several processes share a plan by it.
        engine: keyword arguments of `load_engine`.

    Raises:
        ConfigError: a shard that does not exist, or a crf out of range.
    """

    bundle: Path
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    crf: int = DEFAULT_CRF
    shard: tuple[int, int] = (1, 1)
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k, n = self.shard
        if not 1 <= k <= n:
            raise ConfigError(f"--shard must be K/N with 1 <= K <= N, got {k}/{n}")
        if not 1 <= self.crf <= 51:
            raise ConfigError(f"--crf must be in 1..51, got {self.crf}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a call of `generate` did.

    Attributes:
        num_made, num_kept: videos made now, and found made.
        failed: names of files that could not be made, with the reason.
    """

    num_made: int
    num_kept: int
    failed: dict[str, str]


def generate(folder: Path, settings: GenerateSettings) -> Outcome:
    """Make the videos of the plan in a folder that are not there yet.

    Args:
        folder: with plan.json; videos go to its subfolder.
        settings: must be those of earlier calls, up to device, kernel and shard.

    Raises:
        ConfigError: no plan, other settings than the videos there were made with, or a shape the model cannot make.
        CheckpointError, GenerationError: the bundle cannot be loaded, or five videos in a row failed.
    """
    plan = read_plan(folder)
    videos = folder / VIDEOS_NAME
    k, n = settings.shard
    mine = [(prompt, video) for prompt, video in plan.videos() if prompt.index % n == k - 1]
    missing = [(prompt, video) for prompt, video in mine if not (videos / video.file).is_file()]
    if not missing:
        return Outcome(num_made=0, num_kept=len(mine), failed={})

    from codmd_serve.loading import load_engine
    from codmd_serve.wan.checkpoint import silence_libraries

    silence_libraries()
    videos.mkdir(exist_ok=True)
    engine = load_engine(settings.bundle, **settings.engine)
    shape = _shape(settings, engine.facts)
    _record_generation(folder, plan, engine, {**shape, "crf": settings.crf})
    failed: dict[str, str] = {}
    in_a_row = 0
    with tqdm(total=len(mine), initial=len(mine) - len(missing), unit="video", disable=None) as bar:
        for prompt, video in missing:
            problem = _make(engine, prompt, video, videos / video.file, {**shape, "crf": settings.crf}, folder)
            in_a_row = in_a_row + 1 if problem else 0
            if problem:
                failed[video.file] = problem
            if in_a_row == MAX_FAILURES_IN_A_ROW:
                raise GenerationError(f"{in_a_row} videos in a row failed, the last: {problem}")
            bar.update()
    return Outcome(num_made=len(missing) - len(failed), num_kept=len(mine) - len(missing), failed=failed)


def failures(folder: Path) -> dict[str, str]:
    """Return the files whose last try failed, with the reason, as the ledger of a folder holds them.

    Raises:
        ConfigError: a line that is not of the ledger.
    """
    path = folder / LEDGER_NAME
    if not path.is_file():
        return {}
    failed: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if entry["status"] == "failed":
                failed[entry["file"]] = entry["message"]
            else:
                failed.pop(entry["file"], None)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is damaged: {shown(line)}; delete that line") from error
    return failed


def read_generation(folder: Path) -> dict[str, Any]:
    """Return what the videos of a folder were made with; empty before the first one."""
    path = folder / GENERATION_NAME
    return read_json_object(path, ConfigError) if path.is_file() else {}


def _make(
    engine: Any, prompt: PlannedPrompt, video: Video, path: Path, settings: dict[str, Any], folder: Path
) -> str | None:
    """Make one video; return why it failed."""
    entry: dict[str, Any] = {"file": video.file, "seed": video.seed, "status": "done"}
    try:
        result = engine.generate(GenerateParams(prompt=prompt.model_text, seed=video.seed, **settings), path)
        entry["ms"] = round(sum(result.timings_ms.values()))
    except GenerationError as error:
        entry |= {"status": "failed", "code": error.code, "message": first_line(error)}
        logger.warning("file=%s seed=%d status=failed code=%s", video.file, video.seed, error.code)
    # One write of one line: shards append to the same file.
    with (folder / LEDGER_NAME).open("a", encoding="utf-8") as ledger:
        ledger.write(json.dumps(entry) + "\n")
    return str(entry["message"]) if entry["status"] == "failed" else None


def _shape(settings: GenerateSettings, facts: ModelFacts) -> dict[str, int]:
    names = ("height", "width", "num_frames", "fps")
    shape = {name: getattr(settings, name) or getattr(facts, name) for name in names}
    for name in ("height", "width"):
        if shape[name] % facts.size_multiple or not 0 < shape[name] <= facts.max_side_px:
            raise ConfigError(
                f"--{name} must be a multiple of {facts.size_multiple} up to {facts.max_side_px}, got {shape[name]}"
            )
    frames, step = shape["num_frames"], facts.frame_multiple
    if (frames - 1) % step or not 1 < frames <= facts.max_num_frames:
        raise ConfigError(f"--num-frames must be {step}k + 1, 2..{facts.max_num_frames}, got {frames}")
    if not 1 <= shape["fps"] <= 120:
        raise ConfigError(f"--fps must be in 1..120, got {shape['fps']}")
    return shape


def _record_generation(folder: Path, plan: Plan, engine: Any, settings: dict[str, int]) -> None:
    """Write what makes the videos; refuse to mix two bundles or shapes in one folder."""
    from codmd_serve import __version__
    from codmd_serve.wan.text import fingerprint

    facts = engine.facts
    path = folder / GENERATION_NAME
    fixed = {
        "plan_sha256": plan.sha256,
        "bundle": facts.name,
        "weights": fingerprint(engine.bundle.transformer),
        "dtype": facts.dtype,
        "lossy": facts.lossy,
        "timesteps": list(engine.bundle.spec.timesteps),
        "sampler": engine.bundle.spec.sampler,
        **settings,
    }
    there = read_generation(folder)
    differing = [name for name, value in fixed.items() if there and there.get(name) != value]
    if differing:
        listed = ", ".join(f"{name} {shown(there.get(name))} and now {shown(fixed[name])}" for name in differing)
        raise ConfigError(f"{folder / VIDEOS_NAME} holds videos made with {listed}: use another folder for these")
    if not there:
        seen = {name: getattr(facts, name) for name in ("device", "attention", "execution", "num_steps", "vae_dtype")}
        write_json(path, {**fixed, **seen, "package_version": __version__})
