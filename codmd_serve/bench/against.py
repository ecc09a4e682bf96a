"""Time the engine and its opponents in alternation: the stock pipeline, its teacher, our own lossy variants.

Every trial is written as soon as it ends. A run that is killed or runs out of memory keeps its earlier numbers.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from codmd_serve.bench import lossy
from codmd_serve.bench.contestants import (
    TEACHER_GUIDANCE,
    TEACHER_STEPS,
    Contestant,
    Diffusers,
    Ours,
    student_scheduler,
    teacher_scheduler,
)
from codmd_serve.bench.options import BenchConfig
from codmd_serve.bench.report import Row
from codmd_serve.bench.trials import Pair, Trial, count_operators, requests, run_pairs, spread_of, timed
from codmd_serve.bench.weights import PROMPTS
from codmd_serve.config import GenerateParams
from codmd_serve.engine import Engine
from codmd_serve.errors import CodmdError
from codmd_serve.files import first_line
from codmd_serve.wan.checkpoint import Bundle, load_bundle

# The teacher comes last and is the slowest: this share of the time is for what comes before it.
SHARE_BEFORE_TEACHER = 0.6
# What two copies of a network need besides their weights: activations of one request, and what the allocator keeps.
MEMORY_FOR_A_REQUEST = 12 * 2**30


@dataclass(slots=True)
class BenchRun:
    """State of one measurement: settings, device, output files, start time and load averages."""

    config: BenchConfig
    device: torch.device
    dtype: torch.dtype
    folder: Path
    numbers: Path
    start_s: float = field(default_factory=time.perf_counter)
    left_out: list[str] = field(default_factory=list)
    loads: list[float] = field(default_factory=lambda: [os.getloadavg()[0]])

    def tell(self, name: str, **values: Any) -> None:
        """Append a result to `numbers` as one line of JSON."""
        line = json.dumps({"at_s": round(self.seconds(), 2), "name": name, **values})
        with self.numbers.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def seconds(self) -> float:
        return time.perf_counter() - self.start_s

    def look_at_load(self) -> None:
        self.loads.append(os.getloadavg()[0])


@dataclass(slots=True)
class Measurements:
    """Trials by contestant, pairs by opponent, operators by contestant, and the dtype of the opponent."""

    contestants: dict[str, Contestant]
    trials: dict[str, list[Trial]]
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    operators: dict[str, Any] = field(default_factory=dict)
    lossy: dict[str, Row] = field(default_factory=dict)
    stock_dtype: str = ""


def against(run: BenchRun, bundle: Path, ours: Ours, params: GenerateParams) -> Measurements:
    """Time the engine, alone or against what the settings name.

    Args:
        run: settings and clock.
        bundle: folder of what the engine serves.
        ours: the engine. Where the memory is too small for both, it is emptied before the opponent is loaded.
        params: shape of the requests.
    """
    asked = requests(params, PROMPTS)
    video = run.folder / "bench.mp4"
    found = Measurements(contestants={"ours": ours}, trials={})

    def time_by(name: str) -> Any:
        return lambda given: run_and_tell(name, given)

    def run_and_tell(name: str, given: GenerateParams) -> Trial:
        trial = timed(found.contestants[name], given, video, run.device)
        run.tell("trial", contestant=name, **asdict(trial))
        return trial

    ours.run(next(asked), video)
    if run.config.against == "lossy":
        _against_lossy(run, bundle, ours.engine, found, params, time_by)
    if run.config.against in ("lossy", "none"):
        trials = [time_by("ours")(next(asked))]
        while len(trials) < run.config.pairs and run.seconds() < run.config.limit_s:
            trials.append(time_by("ours")(next(asked)))
        found.trials = {"ours": trials, **found.trials}
        found.operators["ours"] = count_operators(ours, next(asked), video)
        return found
    try:
        _against_stock(run, bundle, found, ours, asked, time_by)
    except torch.OutOfMemoryError as error:
        run.left_out.append(f"what was left of diffusers: {first_line(error)}")
        if "ours" not in found.trials:
            found.trials["ours"] = [time_by("ours")(next(asked))]
            found.operators["ours"] = count_operators(ours, next(asked), video)
        found.contestants.pop("diffusers", None)
    return found


def _against_stock(
    run: BenchRun, bundle: Path, found: Measurements, ours: Ours, asked: Iterator[GenerateParams], by: Any
) -> None:
    """Time the stock pipeline with as many forward passes, then as teacher; alternate where both fit in memory."""
    given = [next(asked) for _ in range(run.config.pairs)]
    alone: list[Trial] = []
    if not _both_fit(run.device, ours.engine):
        alone = _ours_alone(run, found, ours, given, by)
    stock = _fastest_stock(run, bundle, found, ours.num_forwards, next(asked))

    def may_go_on() -> bool:
        return run.seconds() < run.config.limit_s * SHARE_BEFORE_TEACHER

    if alone:
        pairs: list[Pair] = []
        for trial, params in zip(alone, given, strict=False):
            if not pairs or may_go_on():
                pairs.append(Pair(trial, by("diffusers")(params)))
    else:
        pairs = run_pairs(by("ours"), by("diffusers"), iter(given), most=run.config.pairs, may_go_on=may_go_on)
    if len(pairs) < run.config.pairs:
        run.left_out.append(f"{run.config.pairs - len(pairs)} of {run.config.pairs} pairs, for want of time")
    run.look_at_load()
    found.pairs["diffusers"] = pairs
    found.trials = {"ours": [pair.ours for pair in pairs], "diffusers": [pair.other for pair in pairs]}
    for name in ("diffusers",) if alone else ("ours", "diffusers"):
        found.operators[name] = count_operators(found.contestants[name], next(asked), run.folder / "bench.mp4")
    if run.config.teacher_pairs and not alone:
        # The student's weights: what they say does not change what a step costs, and a third copy would not fit.
        teacher = Diffusers(stock, teacher_scheduler(), TEACHER_STEPS, TEACHER_GUIDANCE)
        _against_teacher(run, found, teacher, asked, by)


def _fastest_stock(
    run: BenchRun, bundle: Path, found: Measurements, num_forwards: int, params: GenerateParams
) -> Bundle:
    """Load the opponent, warm, in our dtype; in the one it is faster in where ours was chosen so, on a CPU."""
    may_choose = run.device.type == "cpu" and run.config.dtype == "auto" and run.dtype != torch.float32
    fastest: tuple[float, Bundle, Diffusers] | None = None
    for dtype in (torch.float32, run.dtype) if may_choose else (run.dtype,):
        stock = load_bundle(bundle, dtype, run.device)
        contestant = Diffusers(stock, student_scheduler(stock.spec), num_forwards, 1.0)
        contestant.run(params, run.folder / "bench.mp4")
        cpu_ms = timed(contestant, params, run.folder / "bench.mp4", run.device).cpu_ms if may_choose else 0.0
        if fastest is None or cpu_ms < fastest[0]:
            fastest = cpu_ms, stock, contestant
            found.stock_dtype = str(dtype).removeprefix("torch.")
    assert fastest is not None
    found.contestants["diffusers"] = fastest[2]
    return fastest[1]


def _ours_alone(run: BenchRun, found: Measurements, ours: Ours, given: list[GenerateParams], by: Any) -> list[Trial]:
    """Run all requests on the engine, then release it: the opponent does not fit beside it."""
    trials: list[Trial] = []
    for params in given:
        if not trials or run.seconds() < run.config.limit_s * SHARE_BEFORE_TEACHER / 2:
            trials.append(by("ours")(params))
    found.trials["ours"] = trials
    found.operators["ours"] = count_operators(ours, given[-1], run.folder / "bench.mp4")
    run.left_out.append("turns: the memory is too small for both, so one ran after the other, and no teacher")
    ours.release()
    lossy.release(run.device)
    return trials


def _both_fit(device: torch.device, engine: Engine) -> bool:
    """Return whether a second copy of the bundle fits in memory beside the engine."""
    if device.type != "cuda":
        return True
    bundle = engine.bundle
    modules = (engine.transformer, bundle.text_encoder, bundle.vae)
    weights = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    lossy.release(device)
    return bool(weights + MEMORY_FOR_A_REQUEST <= torch.cuda.mem_get_info(device)[0])


def _against_lossy(
    run: BenchRun, bundle: Path, engine: Engine, found: Measurements, params: GenerateParams, by: Any
) -> None:
    """For each variant: load it, measure its error, and time it in alternation with the engine."""
    problems = lossy.unsupported(run.device, run.dtype)
    same, asked = lossy.some(params, PROMPTS), requests(params, PROMPTS)
    wanted = [lossy.outputs(engine, given) for given in same] if len(problems) < len(lossy.LOSSY_SETTINGS) else []
    for name in (name for name in lossy.LOSSY_SETTINGS if name not in problems):
        if run.seconds() > run.config.limit_s:
            problems[name] = "no time was left"
            continue
        try:
            variant = lossy.load_variant(name, bundle, engine)
            error = lossy.compare_outputs(variant, wanted, same)
        except (CodmdError, torch.OutOfMemoryError) as failure:
            problems[name] = first_line(failure)
            continue
        label = f"lossy {name}"
        found.contestants[label] = Ours(variant)
        found.pairs[label] = run_pairs(
            by("ours"),
            by(label),
            asked,
            most=run.config.pairs,
            may_go_on=lambda: run.seconds() < run.config.limit_s,
        )
        found.trials[label] = [pair.other for pair in found.pairs[label]]
        facts = variant.facts
        found.lossy[label] = {**asdict(error), "execution": facts.execution, "attention": facts.attention}
        # As many forward passes, which is all that is asked for from here on: the next variant needs the memory.
        found.contestants[label] = found.contestants["ours"]
        del variant
        lossy.release(run.device)
        run.look_at_load()
    run.left_out += lossy.left_out(problems)


def _against_teacher(
    run: BenchRun, found: Measurements, teacher: Diffusers, asked: Iterator[GenerateParams], by: Any
) -> None:
    per_forward_s = spread_of([trial.stages_ms["denoise"] for trial in found.trials["diffusers"]]).median / 1000
    per_forward_s /= found.contestants["diffusers"].num_forwards
    expected_s = per_forward_s * teacher.num_forwards
    if run.seconds() + expected_s > run.config.limit_s:
        run.left_out.append(
            f"the 50-step teacher, which would have taken about {expected_s:.0f} s more than there were"
        )
        return
    found.contestants["teacher"] = teacher
    found.pairs["teacher"] = run_pairs(
        by("ours"),
        by("teacher"),
        asked,
        most=run.config.teacher_pairs,
        may_go_on=lambda: run.seconds() + expected_s < run.config.limit_s,
    )
    found.trials["teacher"] = [pair.other for pair in found.pairs["teacher"]]
    run.look_at_load()
