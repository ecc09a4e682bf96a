"""Whether a run fits the machine that it is about to start on: its own settings against the real memory.

Knows sizes; loads no weights. `train` asks it before anything is built.
"""

import contextlib
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.methods.regression import start_of
from distill.networks.base import open_base
from distill.parallel.processes import Processes
from distill.plan.architecture import UnknownNetworkError, read_subject
from distill.plan.options import GIB, LAYOUT, MIN_GPU_GIB, PlanOptions
from distill.plan.planner import Plan, make_plan, smallest, suggest

logger = logging.getLogger(__name__)

CGROUPS = Path("/sys/fs/cgroup")
# Of a GPU: what CUDA, NCCL and fragmentation take, as in `PlanOptions`, but not most of a small card.
RESERVE_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What a run needs of each process, and what a process has.

    Attributes:
        plan: of the run, or of its regressed start where that needs more.
        memory_bytes: of one GPU, or a process's share of the host.
        is_gpu: what these are.
        changes: settings that make it fit; none when it does, or when no setting helps.
        least_bytes: what it needs at least, with any settings.
    """

    plan: Plan
    memory_bytes: int
    is_gpu: bool
    changes: tuple[str, ...]
    least_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Return the bytes of one process at the worst moment."""
        return self.plan.totals[self.plan.peak_phase]

    @property
    def fits(self) -> bool:
        """Return whether it fits."""
        return self.needed_bytes <= self.memory_bytes

    def summary(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {
            "needed_gib": round(self.needed_bytes / GIB, 2),
            "memory_gib": round(self.memory_bytes / GIB, 2),
            "worst_moment": self.plan.peak_phase,
            "fits": self.fits,
            "changes": list(self.changes),
        }

    def refusal(self) -> str:
        """Return one sentence that says what does not fit and what to change."""
        options = self.plan.options
        where, several = ("GPU", "GPUs") if self.is_gpu else ("process", "processes")
        each = f"each of {options.gpus} {several}" if options.gpus > 1 else f"the {where}"
        if self.changes:
            remedy = f"it fits with --set {' '.join(self.changes)}"
        else:
            least = f"no setting makes it fit, the least is {self.least_bytes / GIB:.1f} GiB"
            remedy = (
                f"{least}: use more {'GPUs' if self.is_gpu else 'machines'}, larger ones, or a smaller native video"
            )
        return (
            f"the run needs {self.needed_bytes / GIB:.1f} GiB on {each} of {self.memory_bytes / GIB:.1f} GiB, in its "
            f"{self.plan.peak_phase}: {remedy}; --anyway starts it as it is"
        )


def check_fit(config: DistillConfig, num_processes: int, memory_bytes: int, *, is_gpu: bool) -> Fit | None:
    """Plan a run as it is about to start.

    Args:
        config: of the run.
        num_processes: which share it.
        memory_bytes: of each process: its GPU's, or its share of the host's.
        is_gpu: some of the memory is then kept free, see RESERVE_SHARE.

    Returns:
        The fit; None where a plan cannot count the run, as one of a base on the hub that it does not know, or of an
        analytic world.

    Raises:
        ConfigError, CheckpointError: as `read_subject`.
    """
    if not open_base(config.base).has_blocks:
        return None
    memory_gib = max(memory_bytes / GIB, MIN_GPU_GIB)
    reserve_gib = min(PlanOptions().reserve_gib, RESERVE_SHARE * memory_gib) if is_gpu else 0.0
    layout = {name: getattr(config, name) for name in LAYOUT}
    try:
        subjects = [read_subject(one) for one in (config, start_of(config)) if one is not None]
    except UnknownNetworkError:
        return None
    options = PlanOptions(gpus=num_processes, gpu_gib=memory_gib, reserve_gib=reserve_gib, **layout)
    try:
        plans = [make_plan(subject, options) for subject in subjects]
    except ConfigError as error:
        # A layout that can be trained in, and that only the plan has no form for.
        logger.info("memory not planned reason=%s", str(error))
        return None
    plan = min(plans, key=lambda one: one.headroom_bytes)
    if plan.fits:
        return Fit(plan=plan, memory_bytes=memory_bytes, is_gpu=is_gpu, changes=(), least_bytes=0)
    suggestion = suggest(plan.subject, options)
    changes = () if suggestion is None else _settings(plan.subject.config, suggestion.plan.subject.config)
    least = smallest(plan.subject, options)
    return Fit(
        plan=plan,
        memory_bytes=memory_bytes,
        is_gpu=is_gpu,
        changes=changes,
        least_bytes=least.totals[least.peak_phase],
    )


def _settings(before: DistillConfig, after: DistillConfig) -> tuple[str, ...]:
    names = (*LAYOUT, "teacher_dtype", "residual_dtype")
    pairs = ((name, getattr(before, name), getattr(after, name)) for name in names)
    return tuple(f"{name}={str(new).lower()}" for name, old, new in pairs if new != old)


def process_memory_bytes(processes: Processes) -> int:
    """Return the least memory that any process has: its GPU's, or its share of its host's; every rank calls it."""
    if processes.device.type == "cuda":
        own = torch.cuda.get_device_properties(processes.device).total_memory
    else:
        hosts = processes.gather_texts(platform.node())
        own = host_memory_bytes() // hosts.count(platform.node())
    return -processes.all_reduce_max(-own)[0]


def host_memory_bytes(cgroups: Path = CGROUPS) -> int:
    """Return the memory of this machine, or of its control group where that has a limit.

    Args:
        cgroups: where the control groups are mounted, version 1 or 2.
    """
    return min((os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits(cgroups)))


def _limits(cgroups: Path) -> Iterator[int]:
    # In a container the group that is mounted at the top is its own.
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            yield int((cgroups / name).read_text(encoding="utf-8"))
