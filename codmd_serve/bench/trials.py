"""Times requests in alternation, summarises them, and counts operators; knows no engine."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from codmd_serve.bench.contestants import Contestant
from codmd_serve.config import GenerateParams

NUM_TOP_OPERATORS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One timed request.

    Attributes:
        stages_ms: wall-clock milliseconds per stage, each ended by waiting for the device.
        total_ms: wall-clock milliseconds from the prompt to the finished file.
        cpu_ms: processor time of this process and of the encoder; other work on the machine hardly changes it.
        device_ms: the same between two CUDA events; None on a CPU.
        memory_bytes: device memory that this request took above what was there before it; None on a CPU.
    """

    stages_ms: dict[str, float]
    total_ms: float
    cpu_ms: float
    device_ms: float | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two requests, one right after the other, with the same prompt and seed."""

    ours: Trial
    other: Trial

    @property
    def ratio(self) -> float:
        """Return how many times longer the other took."""
        return self.other.total_ms / self.ours.total_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median, quartiles and extremes of repeated measurements."""

    median: float
    q25: float
    q75: float
    lowest: float
    highest: float
    count: int

    @property
    def relative(self) -> float:
        """Return the interquartile range as a share of the median, a measure of noise."""
        return (self.q75 - self.q25) / self.median if self.median else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorCount:
    """Operators of one request, counted by the profiler.

    Attributes:
        calls: of operators of torch, also those that operators call.
        top: those with the most time of their own: name, calls, share of all operators' own time.
    """

    calls: int
    top: list[tuple[str, int, float]] = field(default_factory=list)


def spread_of(values: Sequence[float]) -> Spread:
    """Summarise at least one measurement."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return Spread(
        median=statistics.median(ordered),
        q25=quartiles[0],
        q75=quartiles[2],
        lowest=ordered[0],
        highest=ordered[-1],
        count=len(ordered),
    )


def requests(params: GenerateParams, prompts: Sequence[str]) -> Iterator[GenerateParams]:
    """Yield requests of one shape without end; prompt and seed change, so every cache misses."""
    for seed, prompt in enumerate(itertools.cycle(prompts)):
        yield replace(params, prompt=prompt, seed=seed)


def timed(contestant: Contestant, params: GenerateParams, path: Path, device: torch.device) -> Trial:
    """Run one request; the mp4 goes to `path`."""
    cpu_s = _cpu_s()
    if device.type != "cuda":
        start_s = time.perf_counter()
        stages = contestant.run(params, path)
        total_ms = 1000 * (time.perf_counter() - start_s)
        cpu_ms = 1000 * (_cpu_s() - cpu_s)
        return Trial(stages_ms=stages, total_ms=total_ms, cpu_ms=cpu_ms, device_ms=None, memory_bytes=None)
    event: Any = torch.cuda.Event  # torch gives it no types
    begun, ended = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start_s = time.perf_counter()
    begun.record()
    stages = contestant.run(params, path)
    ended.record()
    torch.cuda.synchronize(device)
    return Trial(
        stages_ms=stages,
        total_ms=1000 * (time.perf_counter() - start_s),
        cpu_ms=1000 * (_cpu_s() - cpu_s),
        device_ms=begun.elapsed_time(ended),
        memory_bytes=torch.cuda.max_memory_allocated(device) - before,
    )


def _cpu_s() -> float:
    """Return the CPU seconds of this process and of its reaped children."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def run_pairs(
    time_ours: Callable[[GenerateParams], Trial],
    time_other: Callable[[GenerateParams], Trial],
    asked: Iterator[GenerateParams],
    *,
    most: int,
    may_go_on: Callable[[], bool],
) -> list[Pair]:
    """Time two contestants in alternation, so that other load on the machine affects both.

    Args:
        time_ours, time_other: run one request each.
        asked: gives the requests; both of a pair get the same.
        most: pairs; at least one is run.
        may_go_on: asked before every pair but the first.

    Who goes first changes from pair to pair: the first of two may find the processor slower or the memory colder.
    """
    pairs: list[Pair] = []
    while len(pairs) < most and (not pairs or may_go_on()):
        params = next(asked)
        if len(pairs) % 2 == 0:
            ours = time_ours(params)
            pairs.append(Pair(ours, time_other(params)))
        else:
            other = time_other(params)
            pairs.append(Pair(time_ours(params), other))
    return pairs


def count_operators(contestant: Contestant, params: GenerateParams, path: Path) -> OperatorCount:
    """Run one request under torch's profiler."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    # torch 2.11 warns that it forgets events between cycles unless it is told to keep them.
    with profile(activities=activities, acc_events=True) as profiler:
        contestant.run(params, path)
    seen = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
    # A CPU contestant on a CUDA machine leaves nothing on the device.
    on_device = any(event.self_device_time_total > 0 for event in seen)
    cost = {event.key: event.self_device_time_total if on_device else event.self_cpu_time_total for event in seen}
    total = sum(cost.values()) or 1.0
    calls = {event.key: event.count for event in seen}
    names = sorted(cost, key=lambda name: -cost[name])[:NUM_TOP_OPERATORS]
    return OperatorCount(calls=sum(calls.values()), top=[(name, calls[name], cost[name] / total) for name in names])
