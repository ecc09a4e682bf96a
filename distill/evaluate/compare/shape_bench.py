"""Scores one cell of a comparison on ShapeWorld: caption following on three splits, and what captions leave open.

The second is judged against two laws: the guided teacher's, which a student is asked to match, and the truth's.

Legend: K clips of an arm, S clips of one deep caption, F factors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from codmd_serve.errors import ConfigError
from codmd_serve.files import atomic_file
from codmd_serve.wan.attention import use_compact_cross_attention
from distill.config import DistillConfig
from distill.data.packing import add_files
from distill.data.prompts import load_prompts
from distill.evaluate.compare.kept_clips import kept_clips
from distill.evaluate.compare.shape_law import Law, copying, distances, law_of, matrices
from distill.evaluate.compare.table import START, TEACHER, TRUTH, Arm, Table
from distill.evaluate.detect import detect
from distill.evaluate.joint import bend_coverage, measure_factors
from distill.evaluate.sample import (
    Canvas,
    Request,
    SampledModel,
    load_student,
    load_teacher,
    render_truth,
    sample_student,
    sample_teacher,
)
from distill.evaluate.scores import CAPTION_SCORES, score_clip
from distill.networks.base import open_base
from distill.networks.build import denoiser
from distill.networks.teacher import open_teacher
from distill.settings import check_range
from distill.worlds.shapeworld.captions import held_out_captions, parse_caption, unseen_captions
from distill.worlds.shapeworld.schema import FAR, HELD_OUT, STILL

# Of captions, of the references and of noise, far from each other and from any seed of a run.
CAPTION_SEED, REFERENCE_SEED, NOISE_SEED = 999, 9_999, 10_000
COPIED_STEPS = 50
NEW = "new"
SPLITS = (NEW, HELD_OUT, FAR)
LOOKS = ("imaging", "form")
FRAMES_SHOWN = 7
LEAST_SAMPLES = 4
ERRORS = (
    *(f"wrong_{split}" for split in SPLITS),
    *(f"{name}{law}" for name in ("tau_err", "w1", "frame_rho", "kept_err") for law in ("", "_truth")),
    *(f"{name}_err" for name in (*LOOKS, "bend")),
)
"""What a table may test; 0 is right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeBenchConfig:
    """What a table says of the bench; `samples` of the table are the clips of each deep caption.

    Attributes:
        captions: of each split, one clip each.
        deep_captions: held-out captions of moving objects with many clips, of one and two objects in turn.
        reference: clips of each of these that give the law of teacher and of truth.
        strips: held-out captions whose first clip is drawn.

    Raises:
        ConfigError: a number out of range.
    """

    captions: int = 24
    deep_captions: int = 4
    reference: int = 64
    strips: int = 4

    def __post_init__(self) -> None:
        check_range("bench.captions", self.captions, 2, 1000)
        check_range("bench.deep_captions", self.deep_captions, 1, self.captions)
        check_range("bench.reference", self.reference, LEAST_SAMPLES, 10_000)
        check_range("bench.strips", self.strips, 0, self.captions)


@dataclass(frozen=True, slots=True)
class ShapeSuite:
    """The clips that every arm of a seed draws.

    Attributes:
        requests: all of them; captions of the splits come one after the other.
        splits: split of each caption, in order of their indices.
        deep: indices of the deep captions.
    """

    requests: tuple[Request, ...]
    splits: tuple[str, ...]
    deep: tuple[int, ...]

    def first(self, split: str) -> list[int]:
        """Return the place of each caption's first clip, for the captions of a split."""
        return [
            place
            for place, request in enumerate(self.requests)
            if request.seed == 0 and self.splits[request.caption_index] == split
        ]

    def of_caption(self, index: int) -> list[int]:
        """Return the places of a caption's clips, in order of their seeds."""
        return [place for place, request in enumerate(self.requests) if request.caption_index == index]


def check_shape_table(table: Table) -> None:
    """Refuse what the bench cannot score.

    Raises:
        ConfigError: names the key.
    """
    shape_settings(table.bench)
    if table.samples < LEAST_SAMPLES:
        raise ConfigError(f"samples must be {LEAST_SAMPLES} or more: correlations are over the clips of one caption")


def shape_settings(data: Mapping[str, Any]) -> ShapeBenchConfig:
    """Return the settings of a table's key `bench`.

    Raises:
        ConfigError: an unknown key, or a value that is no number in its range.
    """
    known = [entry.name for entry in dataclasses.fields(ShapeBenchConfig)]
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"unknown key {key!r} of bench, expected one of: {', '.join(known)}")
        if type(value) is not int:
            raise ConfigError(f"bench.{key} must be a whole number, got {value!r}")
    return ShapeBenchConfig(**data)


def plan_shape_suite(settings: ShapeBenchConfig, num_samples: int, training: Sequence[str]) -> ShapeSuite:
    """Choose captions and seeds; held-out captions are the same for all runs.

    Args:
        settings: of the bench.
        num_samples: S.
        training: prompts of the run, none of which is among the captions.

    Raises:
        ConfigError: there are not so many captions.
    """
    count = settings.captions
    chosen = {
        NEW: unseen_captions(count, CAPTION_SEED, training),
        HELD_OUT: held_out_captions(count, CAPTION_SEED),
        FAR: held_out_captions(count, CAPTION_SEED, split=FAR),
    }
    if len(chosen[NEW]) < count:
        raise ConfigError(f"bench.captions must be {len(chosen[NEW])} or less: the run trains on all other captions")
    captions = [caption for split in SPLITS for caption in chosen[split]]
    splits = tuple(split for split in SPLITS for _ in range(count))
    deep = _deep(captions, splits, settings.deep_captions)
    requests = [
        Request(caption, index, seed)
        for index, caption in enumerate(captions)
        for seed in range(num_samples if index in deep else 1)
    ]
    return ShapeSuite(tuple(requests), splits, deep)


def _deep(captions: Sequence[str], splits: Sequence[str], num: int) -> tuple[int, ...]:
    """Return held-out captions whose objects all move alike, of one and two objects in turn."""
    moving: dict[int, list[int]] = {1: [], 2: []}
    for index, caption in enumerate(captions):
        scene = parse_caption(caption)
        if splits[index] == HELD_OUT and scene.motion != STILL and scene.second_move is None:
            moving[scene.count].append(index)
    deep = [index for pair in zip(moving[1], moving[2], strict=False) for index in pair][:num]
    if len(deep) < num:
        raise ConfigError(f"bench.deep_captions must be {len(deep)} or less for bench.captions {len(captions) // 3}")
    return tuple(sorted(deep))


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapeBench:
    """What all cells of one guidance scale are scored against.

    Attributes:
        config: of the baseline; gives base, size, prompts and guidance.
        settings: of the bench.
        num_samples: S.
        cache_dir: keeps the teacher's clips.
        device: where networks are sampled.
    """

    config: DistillConfig
    settings: ShapeBenchConfig
    num_samples: int
    cache_dir: Path
    device: str

    def score_arm(
        self, arm: Arm, config: DistillConfig, seed: int, bundle: Path | None, folder: Path, *, is_tested: bool = True
    ) -> dict[str, Any]:
        """Return the scores after the last step, as one step; matrices of dependence; and the strips of some clips.

        Args:
            arm: of the cell.
            config: of the run, or of the baseline for an arm that trains nothing.
            seed: of noise; all arms of a seed begin with the same noise.
            bundle: the student of a run, or of the start.
            folder: for the strips.
            is_tested: without it, a point of a curve, which has neither matrices nor strips.

        Raises:
            CheckpointError: the bundle is missing or damaged.
        """
        suite = self.suite(seed)
        clips = self._clips(arm, config, seed, bundle, suite)
        scores, factors = _measure(suite.requests, clips)
        law = law_of(
            [factors[suite.of_caption(i)] for i in suite.deep], [clips[suite.of_caption(i)] for i in suite.deep]
        )
        step = {**_following(suite, scores), **_looks(suite, scores), **self._distances(law)}
        coverage = [bend_coverage(group) for group in law.factors]
        step |= {"bend_err": 1.0 - float(np.nanmean(coverage)), "copying": self._copying(suite, clips, seed)}
        found: dict[str, Any] = {"steps": [step]}
        if is_tested:
            found |= {"matrices": matrices(law), "clips": self._write_strips(suite, clips, folder)}
        return found

    def suite(self, seed: int) -> ShapeSuite:
        """Return the clips that the arms of a seed draw."""
        return _suite(self.settings, self.num_samples, dataclasses.replace(self.config, seed=seed, samples_seed=0))

    def _clips(self, arm: Arm, config: DistillConfig, seed: int, bundle: Path | None, suite: ShapeSuite) -> np.ndarray:
        noise_seed, canvas = NOISE_SEED + seed, self.canvas
        if arm.kind == TRUTH:
            return render_truth(suite.requests, noise_seed, canvas=canvas)
        if arm.kind == TEACHER:
            return self._teacher_clips(suite.requests, arm.steps, noise_seed)
        if arm.kind == START and bundle is None:
            model = self._start(config)
        else:
            assert bundle is not None
            model = load_student(bundle, torch.device(self.device))
        return sample_student(model, suite.requests, bench_seed=noise_seed, canvas=canvas)

    def _start(self, config: DistillConfig) -> SampledModel:
        """Return the network that students start from, with their steps."""
        base, grid = open_base(config.base), config.grid()
        transformer = base.load_transformer(torch.float32)
        if config.student_from:
            transformer = base.load_start(transformer, config.student_from, "student_from")
        transformer.requires_grad_(False).eval().to(self.device)
        return dataclasses.replace(
            self.teacher,
            denoise=denoiser(use_compact_cross_attention(transformer), "fp32"),
            scheduler=None,
            sigmas=grid.sigmas,
            timesteps=grid.timesteps,
            sampler=config.sampler,
        )

    def _distances(self, law: Law) -> dict[str, Any]:
        against = distances(law, self.teacher_law)
        truth = distances(law, self.truth_law)
        return {**against, **{f"{name}_truth": value for name, value in truth.items() if name != "taus"}}

    def _copying(self, suite: ShapeSuite, clips: np.ndarray, seed: int) -> float:
        places = [suite.of_caption(index) for index in suite.deep]
        wanted = self._teacher_clips(suite.requests, COPIED_STEPS, NOISE_SEED + seed)
        return copying([clips[own] for own in places], [wanted[own] for own in places])

    def _write_strips(self, suite: ShapeSuite, clips: np.ndarray, folder: Path) -> list[dict[str, str]]:
        """Write the frames of the first held-out clips side by side; paths are relative to the folder's parent."""
        written = []
        for number, place in enumerate(suite.first(HELD_OUT)[: self.settings.strips]):
            frames = clips[place][np.linspace(0, clips.shape[1] - 1, min(FRAMES_SHOWN, clips.shape[1])).astype(int)]
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number}.png"
            with atomic_file(path) as temporary:
                Image.fromarray(np.concatenate(frames, axis=1)).save(temporary, format="png")
            written.append({"caption": suite.requests[place].caption, "strip": f"{folder.name}/{path.name}"})
        return written

    @property
    def canvas(self) -> Canvas:
        """The size of all clips."""
        native = self.config.native
        return Canvas(native.height, native.width, native.num_frames)

    @cached_property
    def teacher(self) -> SampledModel:
        """The teacher, with the other parts of its pipeline."""
        return load_teacher(self.config.base, torch.device(self.device))

    @cached_property
    def teacher_law(self) -> Law:
        """The law of the guided teacher in many steps, from other noise than any arm's."""
        requests = self._reference_requests()
        return self._law(requests, self._teacher_clips(requests, COPIED_STEPS, REFERENCE_SEED))

    @cached_property
    def truth_law(self) -> Law:
        """The law of the world."""
        requests = self._reference_requests()
        return self._law(requests, render_truth(requests, REFERENCE_SEED, canvas=self.canvas))

    def _reference_requests(self) -> tuple[Request, ...]:
        suite = self.suite(0)  # deep captions are held out, so they are those of every seed
        captions = {request.caption_index: request.caption for request in suite.requests}
        return tuple(
            Request(captions[index], index, seed) for index in suite.deep for seed in range(self.settings.reference)
        )

    def _law(self, requests: Sequence[Request], clips: np.ndarray) -> Law:
        _, factors = _measure(requests, clips)
        size = self.settings.reference
        starts = range(0, len(requests), size)
        return law_of([factors[i : i + size] for i in starts], [clips[i : i + size] for i in starts])

    def _teacher_clips(self, requests: Sequence[Request], num_steps: int, noise_seed: int) -> np.ndarray:
        guidance = self.config.guidance_scale
        asked = [[request.caption, request.caption_index, request.seed] for request in requests]
        settings = [num_steps, guidance, noise_seed, dataclasses.asdict(self.config.native), asked]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(self._teacher_digest)
        return kept_clips(
            self.cache_dir / f"shape-teacher-{num_steps}-{digest.hexdigest()[:16]}",
            requests,
            lambda part: sample_teacher(
                self.teacher,
                part,
                num_steps=num_steps,
                guidance_scale=guidance,
                bench_seed=noise_seed,
                canvas=self.canvas,
            ),
        )

    @cached_property
    def _teacher_digest(self) -> bytes:
        digest = hashlib.sha256()
        add_files(digest, open_teacher(self.config, open_base(self.config.base)).files())
        return digest.digest()


@lru_cache(maxsize=8)
def _suite(settings: ShapeBenchConfig, num_samples: int, config: DistillConfig) -> ShapeSuite:
    return plan_shape_suite(settings, num_samples, load_prompts(config))


def _measure(requests: Sequence[Request], clips: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return scores, by name (K,), and factors (K, F) of clips."""
    scores, factors = [], []
    for request, clip in zip(requests, clips, strict=True):
        scene, detection = parse_caption(request.caption), detect(clip)
        scores.append(score_clip(scene, detection, clip))
        factors.append(measure_factors(scene, detection))
    return {name: np.array([values[name] for values in scores]) for name in scores[0]}, np.stack(factors)


def _following(suite: ShapeSuite, scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the share of wrong clips of each split, and each caption score of the held-out split, 1 is right."""
    wrong = {f"wrong_{split}": 1.0 - float(scores["all"][suite.first(split)].mean()) for split in SPLITS}
    held = {name: scores[name][suite.first(HELD_OUT)] for name in CAPTION_SCORES}
    return wrong | {name: float(np.nanmean(own)) for name, own in held.items() if not np.isnan(own).all()}


def _looks(suite: ShapeSuite, scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return 1 less the mean of each of LOOKS; a clip without objects has none of them."""
    first = [place for split in SPLITS for place in suite.first(split)]
    return {f"{name}_err": 1.0 - float(np.nan_to_num(scores[name][first]).mean()) for name in LOOKS}


@cache
def open_shape_bench(
    config: DistillConfig, settings: ShapeBenchConfig, num_samples: int, cache_dir: Path, device: str
) -> ShapeBench:
    """Return the bench of a table; one for each process."""
    return ShapeBench(config=config, settings=settings, num_samples=num_samples, cache_dir=cache_dir, device=device)
