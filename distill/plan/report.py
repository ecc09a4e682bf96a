"""Formats a plan as text and as JSON; computes only sums."""

import dataclasses
import textwrap
from typing import Any

from distill.methods.registry import METHODS
from distill.plan.memory import MEMORY_PARTS, PHASES
from distill.plan.options import GIB, flag
from distill.plan.planner import Plan, Suggestion, make_plan
from distill.plan.reference import ReferenceLayout

LABEL_WIDTH = 20
COLUMN_WIDTH = 10
MIB = 1024**2
TEXT_WIDTH = 120
_STATES = ("weights", "optimizer", "gradients")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """The content of a plan's report.

    Attributes:
        plan: the requested one.
        suggestion: the least change that fits, if the plan does not.
        smallest: the plan that needs least memory, if none fits.
        reference: the authors' layout of a published recipe.
        command: the one that was run.
    """

    plan: Plan
    suggestion: Suggestion | None
    smallest: Plan | None
    reference: ReferenceLayout | None
    command: str


def plan_text(report: PlanReport) -> str:
    """Return the whole report, lines of at most 120 characters but for commands."""
    plan = report.plan
    sections = [_head(plan), _memory_table(plan), _verdict(report), _operations(plan)]
    notes = plan_notes(plan)
    if notes:
        wrap = textwrap.TextWrapper(TEXT_WIDTH, initial_indent="  - ", subsequent_indent="    ")
        sections.append("\n".join(["notes", *map(wrap.fill, notes)]))
    if report.reference is not None:
        sections.append(_reference(report.reference))
    return "\n\n".join(sections)


def plan_json(report: PlanReport) -> dict[str, Any]:
    """Return the report as JSON values, sizes in bytes."""
    data = _plan_json(report.plan)
    data["suggestion"] = None
    if report.suggestion is not None:
        changes = list(report.suggestion.changes)
        command = " ".join([report.command, *changes])
        data["suggestion"] = {"changes": changes, "command": command, "plan": _plan_json(report.suggestion.plan)}
    data["smallest"] = _plan_json(report.smallest) if report.smallest else None
    reference = report.reference
    data["reference"] = None
    if reference is not None:
        data["reference"] = {
            **dataclasses.asdict(reference),
            "total_bytes": reference.total,
            "headroom_bytes": reference.headroom_bytes,
            "fits": reference.headroom_bytes >= 0,
        }
    return data


def plan_notes(plan: Plan) -> list[str]:
    """Return the notes that qualify the numbers of this plan."""
    config, options = plan.subject.config, plan.options
    notes = []
    if options.lora_critic_rank:
        notes.append("the LoRA critic shares the teacher's weights: both are one copy in teacher weights")
    if options.lora_student_rank:
        dtype = config.frozen_dtype("student")
        notes.append(f"the LoRA student has frozen weights of its own, {dtype}, which no other network shares")
    if options.master_dtype == "bf16":
        notes.append("bf16 master weights lose every update below 1/512 of a weight: fp32 is what the recipes mean")
    notes += METHODS[config.method].notes(config)
    notes += _sync_note(plan)
    if options.activation_checkpointing is False and options.gpus == 1:
        notes.append("activations are those of eager mode; a compiled block keeps less")
    return notes


def _sync_note(plan: Plan) -> list[str]:
    """Say that reducing gradients once per update fits, where it does and there is something to gain."""
    options = plan.options
    if options.gpus == 1 or options.accumulate == 1 or options.gradient_sync == "last" or not plan.fits:
        return []
    once = make_plan(plan.subject, dataclasses.replace(options, gradient_sync="last"))
    if not once.fits:
        return []
    saved = plan.gathered_bytes - once.gathered_bytes
    return [
        f"{flag('gradient_sync')} last fits too: {_gib(saved)} GiB less traffic to each GPU per iteration, "
        f"{_gib(once.headroom_bytes)} GiB left at its worst moment"
    ]


def _head(plan: Plan) -> str:
    subject, options = plan.subject, plan.options
    config, native, parameters = subject.config, subject.config.native, subject.parameters
    checkpointing = "on" if options.activation_checkpointing else "off"
    further = []
    if options.shards < options.gpus:
        further.append(f"  replicas  {options.gpus // options.shards} of {options.shards} GPUs each")
    if config.residual_dtype == "bf16":
        further.append("  residual  stream in bf16")
    critic = f"LoRA of rank {options.lora_critic_rank}" if options.lora_critic_rank else "full"
    student = f"student LoRA of rank {options.lora_student_rank}; " if options.lora_student_rank else ""
    teacher = config.teacher_dtype
    if subject.teacher is not None:
        teacher = f"{subject.teacher.parameters.total / 1e9:.3f} G parameters, {teacher}"
    return "\n".join(
        [
            f"plan of {config.recipe} by {config.method} on {options.gpus} x {options.gpu_gib:g} GiB",
            f"  network   {parameters.total / 1e9:.3f} G parameters, {subject.architecture.num_layers} blocks of "
            f"{parameters.block / 1e6:.1f} M; {student}critic {critic}; teacher {teacher}, "
            f"master weights {options.master_dtype}",
            f"  sample    {native.width}x{native.height}, {native.num_frames} frames = {subject.num_tokens:,} tokens, "
            f"{plan.load.sequence.tokens:,} on a GPU (context parallel {options.context_parallel})",
            f"  batch     {config.batch_size} = {plan.load.samples} at once x {options.data_parallel} data parallel x "
            f"{options.accumulate} accumulated; activation checkpointing {checkpointing}",
            *further,
        ]
    )


def _memory_table(plan: Plan) -> str:
    unit, size = (
        ("GiB", GIB) if plan.totals[plan.peak_phase] - plan.memory[plan.peak_phase]["reserve"] >= GIB else ("MiB", MIB)
    )
    rows = [(f"memory per GPU, {unit}", [phase.split()[0] for phase in PHASES])]
    rows.append(("", [phase.split()[1] for phase in PHASES]))
    for part in MEMORY_PARTS:
        sizes = [plan.memory[phase][part] for phase in PHASES]
        if any(sizes):
            rows.append((part, [f"{value / size:,.1f}" for value in sizes]))
    rows.append(("total", [f"{plan.totals[phase] / size:,.1f}" for phase in PHASES]))
    lines = [f"{label:<{LABEL_WIDTH}}" + "".join(f"{cell:>{COLUMN_WIDTH}}" for cell in cells) for label, cells in rows]
    ruler = "-" * (LABEL_WIDTH + COLUMN_WIDTH * len(PHASES))
    return "\n".join([*lines[:2], ruler, *lines[2:-1], ruler, lines[-1]])


def _verdict(report: PlanReport) -> str:
    plan, suggestion = report.plan, report.suggestion
    size = f"{plan.options.gpu_gib:g} GiB"
    if plan.fits:
        return f"FITS: {_gib(plan.headroom_bytes)} GiB of {size} are left at the worst moment, {plan.peak_phase}."
    lines = [f"DOES NOT FIT: {plan.peak_phase} needs {_gib(-plan.headroom_bytes)} GiB more than {size}."]
    if suggestion is not None:
        lines += [
            f"It fits, with {_gib(suggestion.plan.headroom_bytes)} GiB left and "
            f"{suggestion.plan.hours_per_1000_iterations:.1f} h per 1000 iterations, with "
            f"{' '.join(suggestion.changes)}:",
            f"  {' '.join([report.command, *suggestion.changes])}",
            "",
            _memory_table(suggestion.plan),
        ]
    elif report.smallest is not None:
        lines.append(
            f"No option makes it fit: the least is {_gib(report.smallest.totals[report.smallest.peak_phase])} GiB "
            "per GPU. Use more GPUs, larger ones, or a smaller native video."
        )
    return "\n".join(lines)


def _operations(plan: Plan) -> str:
    config, options, total = plan.subject.config, plan.options, sum(plan.flops.values())
    unit, size = next(
        ((unit, size) for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12)) if total >= size), ("GFLOP", 1e9)
    )
    rows = [
        f"  {part:<18}{flops / size:>12,.3f}{100 * flops / total:>7.1f}%" for part, flops in plan.flops.items() if flops
    ]
    lines = [
        f"operations per iteration, {unit} on all GPUs (mean; the student has {plan.passes['student'].turns:.3g} and "
        f"the critic {plan.passes['critic'].turns:.3g} turns)",
        *rows,
        f"  {'total':<18}{total / size:>12,.3f}",
        "",
        f"time: {plan.seconds_per_iteration:.3g} s per iteration, {plan.hours_per_1000_iterations:.3g} h per 1000 "
        f"iterations, at {options.tflops:g} TFLOP/s per GPU, which is an assumption",
    ]
    if plan.sampling_flops:
        lines.append(
            f"before the first iteration the GPUs sample the teacher, each its share: "
            f"{plan.sampling_flops / 1e15:,.3g} PFLOP, {plan.sampling_hours:.3g} h"
        )
    if plan.start_flops:
        hours = plan.start_flops / (options.tflops * 1e12) / 3600
        lines.append(
            f"then {config.start.updates:,} updates of the regressed start: {plan.start_flops / 1e15:,.3g} PFLOP on "
            f"each GPU, {hours:.3g} h"
        )
    if plan.gathered_bytes:
        rate = plan.gathered_bytes / plan.seconds_per_iteration / 1e9
        lines.append(
            f"FSDP moves {_gib(plan.gathered_bytes)} GiB to each GPU per iteration: hidden where its link takes in "
            f"clearly more than {rate:.1f} GB/s"
        )
    if plan.replica_bytes:
        lines.append(
            f"of it {_gib(plan.replica_bytes)} GiB come from the other {options.gpus // options.shards - 1} replicas, "
            f"the rest from the {options.shards} GPUs of its own"
        )
    return "\n".join(lines)


def _reference(reference: ReferenceLayout) -> str:
    is_over = reference.headroom_bytes < 0
    verdict = f"does not fit, {_gib(-reference.headroom_bytes)} GiB over" if is_over else "fits"
    width = max(len(part) for part in (*reference.parts, *reference.savings))
    lines = [
        f"the authors' layout on these GPUs, worked out from their code, {reference.samples} at once: "
        f"{_gib(reference.total)} GiB per GPU, {verdict}",
        *(f"  {part:<{width}}{_gib(size):>8}" for part, size in reference.parts.items()),
    ]
    if is_over:
        states = sum(size for part, size in reference.parts.items() if part.split(":")[0] in _STATES)
        left = reference.gpu_bytes - states
        lines += [
            f"  Why: weights, moments and gradients take {_gib(states)} of {_gib(reference.gpu_bytes)} GiB, and the "
            f"{_gib(left)} left do not hold the other {_gib(reference.total - states)}.",
            "  What each would take away:",
            *(f"  {change:<{width}}{_gib(-size):>8}" for change, size in reference.savings.items()),
        ]
    return "\n".join(lines)


def _plan_json(plan: Plan) -> dict[str, Any]:
    subject = plan.subject
    return {
        "recipe": subject.config.recipe,
        "base": subject.config.base,
        "method": subject.config.method,
        "options": dataclasses.asdict(plan.options),
        "parameters": dataclasses.asdict(subject.parameters),
        "teacher_parameters": dataclasses.asdict(subject.network("teacher").parameters),
        "latents": list(subject.latents),
        "num_tokens": subject.num_tokens,
        "batch_size": subject.config.batch_size,
        "samples_at_once": plan.load.samples,
        "memory_bytes": plan.memory,
        "total_bytes": plan.totals,
        "peak_phase": plan.peak_phase,
        "headroom_bytes": plan.headroom_bytes,
        "fits": plan.fits,
        "flops_per_iteration": plan.flops,
        "seconds_per_iteration": plan.seconds_per_iteration,
        "hours_per_1000_iterations": plan.hours_per_1000_iterations,
        "gathered_bytes_per_iteration": plan.gathered_bytes,
        "replica_bytes_per_iteration": plan.replica_bytes,
        "turns_per_iteration": {role: one.turns for role, one in plan.passes.items()},
        "sampling_flops_per_gpu": plan.sampling_flops,
        "sampling_hours": plan.sampling_hours,
        "start_flops_per_gpu": plan.start_flops,
        "notes": plan_notes(plan),
    }


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if abs(size) >= 0.1 * GIB or size == 0 else f"{size / GIB:.2g}"
