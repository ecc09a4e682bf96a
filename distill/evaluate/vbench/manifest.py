"""The plan of a VBench run: which videos, from which prompts and seeds, under which names; makes none of them.

File names are made of numbers alone. A prompt never becomes a path: it may hold a slash, and VBench has two prompts
that differ only in case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codmd_serve.errors import ConfigError
from codmd_serve.files import write_json
from codmd_serve.textfiles import read_json_object, shown
from distill.evaluate.vbench.facts import DIMENSIONS, FLICKER, SAMPLES, VBENCH_VERSION, Preset
from distill.evaluate.vbench.suite import Prompt, Suite

FORMAT = "codmd-vbench-plan-1"
PLAN_NAME = "plan.json"
MAX_BASE_SEED = 4000  # keeps every seed below 2^32, which torch's CPU generator takes as it is
MAX_SAMPLES = 99
MAX_PROMPTS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One planned video.

    Attributes:
        file: its name in the folder of videos.
        seed: of its noise.
        sample: counts the videos of its prompt.
    """

    file: str
    seed: int
    sample: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPrompt:
    """One prompt of a plan.

    Attributes:
        index: in the suite; a subset keeps it, so equal prompts have equal seeds in every plan.
        text: the short prompt, which the evaluators are told.
        model_text: what the model is told; `text` unless there are augmented prompts.
        dimensions: those of the plan that are scored on it.
        auxiliary: for the evaluators, by dimension.
        videos: in order of sample.
    """

    index: int
    text: str
    model_text: str
    dimensions: list[str]
    auxiliary: dict[str, Any]
    videos: list[Video]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A whole plan, as plan.json holds it.

    Attributes:
        preset: its name.
        dimensions: to be scored.
        base_seed: that all seeds are made of.
        suite_sha256: of the prompt list; `is_official` when it is that of VBench 0.1.5.
        augmented_sha256: of the file of longer prompts; empty without one.
        prompts: in the suite's order.
        sha256: of plan.json; results name it. Empty before it is written.
    """

    preset: str
    dimensions: list[str]
    base_seed: int
    suite_sha256: str
    is_official: bool
    augmented_sha256: str
    prompts: list[PlannedPrompt]
    sha256: str = ""

    def videos(self) -> Iterator[tuple[PlannedPrompt, Video]]:
        """Yield every planned video with its prompt."""
        for prompt in self.prompts:
            for video in prompt.videos:
                yield prompt, video

    def scored_on(self, dimension: str) -> list[PlannedPrompt]:
        """Return the prompts of a dimension."""
        return [prompt for prompt in self.prompts if dimension in prompt.dimensions]


def make_plan(
    suite: Suite,
    preset: Preset,
    *,
    dimensions: Sequence[str] = (),
    samples: int | None = None,
    flicker_samples: int | None = None,
    base_seed: int = 0,
    augmented: dict[int, str] | None = None,
    augmented_sha256: str = "",
) -> Plan:
    """Plan the videos of a suite.

    Args:
        suite, preset: what to score.
        dimensions: a part of the preset's; empty is all.
        samples, flicker_samples: videos of a prompt; None is the preset's.
        base_seed: 0..4000.
        augmented: longer prompts by index, for the model alone.
        augmented_sha256: of their file.

    Raises:
        ConfigError: a number out of range, or dimensions that the suite has no prompt for.
    """
    wanted = [name for name in preset.dimensions if not dimensions or name in dimensions]
    outside = [name for name in dimensions if name not in preset.dimensions]
    if outside:
        raise ConfigError(
            f"the preset {preset.name} has no {', '.join(outside)}; it has {', '.join(preset.dimensions)}"
        )
    if len(suite.prompts) > MAX_PROMPTS:
        raise ConfigError(f"a plan has at most {MAX_PROMPTS} prompts, the suite has {len(suite.prompts)}")
    counts = {
        "samples": preset.samples if samples is None else samples,
        "flicker samples": preset.flicker_samples if flicker_samples is None else flicker_samples,
    }
    for name, count in counts.items():
        if not 1 <= count <= MAX_SAMPLES:
            raise ConfigError(f"{name} must be in 1..{MAX_SAMPLES}, got {count}")
    if not 0 <= base_seed <= MAX_BASE_SEED:
        raise ConfigError(f"the seed must be in 0..{MAX_BASE_SEED}, got {base_seed}")
    prompts = []
    for prompt in suite.prompts:
        scored = [name for name in wanted if name in prompt.dimensions]
        if scored:
            count = max(counts["flicker samples" if name == FLICKER else "samples"] for name in scored)
            said = prompt.text if augmented is None else augmented[prompt.index]
            prompts.append(_planned(prompt, scored, said, count, base_seed))
    bare = [name for name in wanted if not any(name in prompt.dimensions for prompt in prompts)]
    if bare:
        raise ConfigError(f"the suite has no prompt for {', '.join(bare)}: leave them out with --dimensions")
    return Plan(
        preset=preset.name,
        dimensions=wanted,
        base_seed=base_seed,
        suite_sha256=suite.sha256,
        is_official=suite.is_official,
        augmented_sha256=augmented_sha256,
        prompts=prompts,
    )


def video_seed(base_seed: int, index: int, sample: int) -> int:
    """Return the seed of a video: no two videos of a plan share one, and no two base seeds do."""
    assert index < MAX_PROMPTS and sample < 100
    return 1_000_000 * base_seed + 100 * index + sample


def write_plan(plan: Plan, folder: Path) -> Path:
    """Write plan.json into a folder, which is made; the same plan may be written again.

    Raises:
        ConfigError: another plan stands there, or the folder cannot be written.
    """
    path = folder / PLAN_NAME
    content = {"format": FORMAT, "vbench": VBENCH_VERSION, **asdict(plan)}
    del content["sha256"]
    if path.exists() and read_json_object(path, ConfigError) != json.loads(json.dumps(content)):
        raise ConfigError(f"{path} holds another plan: choose an empty folder, for its videos belong to that one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, content, indent=1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def read_plan(folder: Path) -> Plan:
    """Read the plan of a folder.

    Raises:
        ConfigError: there is none, it is damaged, or two videos share a name or a seed.
    """
    path = folder / PLAN_NAME
    if not path.is_file():
        raise ConfigError(f"no {PLAN_NAME} in {folder}: `codmd-distill eval vbench plan --out {folder}` writes it")
    data = read_json_object(path, ConfigError)
    if data.get("format") != FORMAT:
        raise ConfigError(f"{path} must have the format {FORMAT}, got {shown(data.get('format'))}")
    try:
        prompts = [
            PlannedPrompt(**{**entry, "videos": [Video(**video) for video in entry["videos"]]})
            for entry in data["prompts"]
        ]
        names = ("preset", "dimensions", "base_seed", "suite_sha256", "is_official", "augmented_sha256")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        plan = Plan(prompts=prompts, sha256=digest, **{name: data[name] for name in names})
        _check_plan(plan, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__} {error}; write it again with `plan`") from error
    return plan


def case_collisions(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of names that differ only in case: one file on the file systems of macOS and Windows."""
    seen: dict[str, str] = {}
    pairs = []
    for name in sorted(set(names)):
        first = seen.setdefault(name.casefold(), name)
        if first != name:
            pairs.append((first, name))
    return pairs


def refuse_case_collisions(names: Sequence[str], where: str) -> None:
    """Refuse names that differ only in case.

    Raises:
        ConfigError: with the list.
    """
    pairs = case_collisions(names)
    if pairs:
        shown_pairs = ", ".join(f"{first!r} and {second!r}" for first, second in pairs)
        raise ConfigError(f"{where} holds files that differ only in case, which is one file elsewhere: {shown_pairs}")


def full_samples(prompt: PlannedPrompt) -> list[Video]:
    """Return the videos that VBench scores of a prompt: the first five."""
    return prompt.videos[:SAMPLES]


def _planned(prompt: Prompt, scored: list[str], said: str, count: int, base_seed: int) -> PlannedPrompt:
    videos = [
        Video(
            file=f"{prompt.index:04d}-{sample:02d}.mp4", seed=video_seed(base_seed, prompt.index, sample), sample=sample
        )
        for sample in range(count)
    ]
    auxiliary = {name: value for name, value in prompt.auxiliary.items() if name in scored}
    return PlannedPrompt(
        index=prompt.index,
        text=prompt.text,
        model_text=said,
        dimensions=scored,
        auxiliary=auxiliary,
        videos=videos,
    )


def _check_plan(plan: Plan, path: Path) -> None:
    unknown = [name for name in plan.dimensions if name not in DIMENSIONS]
    if unknown:
        raise ConfigError(f"{path}: unknown dimensions {', '.join(map(shown, unknown))}")
    files = [video.file for _, video in plan.videos()]
    seeds = [video.seed for _, video in plan.videos()]
    for prompt, video in plan.videos():
        if video.file != f"{prompt.index:04d}-{video.sample:02d}.mp4":
            raise ConfigError(f"{path}: {shown(video.file)} is no name that `plan` gives a video")
    if len(set(files)) < len(files) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: two videos share a name or a seed; write it again with `plan`")
