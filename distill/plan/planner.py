"""Makes a plan from settings and options, and finds the smallest change that makes a run fit; pure arithmetic."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.data.prompts import load_prompts
from distill.methods.draws import Passes
from distill.methods.registry import METHODS
from distill.methods.regression import start_of
from distill.networks.head import head_blocks
from distill.plan.architecture import Subject
from distill.plan.flops import (
    NetworkFlops,
    Sequence,
    classifier_flops,
    derivative_flops,
    iteration_flops,
    network_flops,
)
from distill.plan.memory import (
    MemoryByPhase,
    MicroBatch,
    network_of,
    phase_bytes,
    precision_of,
    role_load,
    trained_counts,
)
from distill.plan.options import DTYPE_BYTES, GIB, LAYOUT, PlanOptions, divisors, flag

SUGGESTED_LORA_RANK = 64
ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Memory and time that a run needs.

    Attributes:
        memory: bytes of one GPU by phase and part.
        flops: operations of a mean iteration on all GPUs together, by part.
        gathered_bytes: what one GPU receives in an iteration to assemble sharded weights and to reduce gradients.
        replica_bytes: those of them that come from other replicas: gradients of its own shards (HSDP).
        passes: of the method, by role.
    """

    subject: Subject
    options: PlanOptions
    load: MicroBatch
    memory: MemoryByPhase
    flops: dict[str, float]
    gathered_bytes: float
    replica_bytes: float
    passes: Mapping[str, Passes]

    @property
    def totals(self) -> dict[str, int]:
        """Return the bytes of one GPU by phase."""
        return {phase: sum(parts.values()) for phase, parts in self.memory.items()}

    @property
    def peak_phase(self) -> str:
        """Return the phase with the highest memory."""
        return max(self.totals, key=lambda phase: self.totals[phase])

    @property
    def headroom_bytes(self) -> int:
        """Return the free bytes in the worst phase; negative when it does not fit."""
        return round(self.options.gpu_gib * GIB) - self.totals[self.peak_phase]

    @property
    def fits(self) -> bool:
        """Return whether every phase fits."""
        return self.headroom_bytes >= 0

    @property
    def seconds_per_iteration(self) -> float:
        """Return the mean seconds of an iteration at the stated rate, with all communication hidden."""
        return sum(self.flops.values()) / (self.options.gpus * self.options.tflops * 1e12)

    @property
    def hours_per_1000_iterations(self) -> float:
        """Return hours per 1000 iterations at that rate."""
        return self.seconds_per_iteration * ITERATIONS / 3600

    @property
    def sampling_flops(self) -> float:
        """Return the operations of one GPU for its share of the teacher's samples, before the first iteration.

        Raises:
            ConfigError: the prompts cannot be read.
        """
        return _sampling_flops(self.subject, self.load, self.options)

    @property
    def start_flops(self) -> float:
        """Return the operations of one GPU for the updates of a regressed start."""
        options = self.options
        network = _network_flops(self.subject, self.load, options, "student")
        again = network.recomputation if options.activation_checkpointing else 0.0
        num_samples = self.subject.config.start.updates * self.load.samples * options.accumulate
        return num_samples * (network.forward + again + network.backward)

    @property
    def sampling_hours(self) -> float:
        """Return the hours for the teacher's samples at the stated rate, before the first iteration."""
        return self.sampling_flops / (self.options.tflops * 1e12) / 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """A plan that fits, and the command-line arguments that give it."""

    plan: Plan
    changes: tuple[str, ...]


def make_plan(subject: Subject, options: PlanOptions) -> Plan:
    """Plan a run.

    Args:
        subject: settings and network.
        options: machine and layout.

    Raises:
        ConfigError: samples, tokens or heads that do not divide over the GPUs, too large a rank, or a layout that the
            method cannot train in.
    """
    load = _split(subject, options)
    # The method sees the layout: it may refuse it, and its passes may depend on it.
    config = dataclasses.replace(subject.config, **{name: getattr(options, name) for name in LAYOUT})
    subject = dataclasses.replace(subject, config=config)
    passes = METHODS[config.method].passes(config)
    per_sample = _sample_flops(subject, options, load, passes)
    num_samples = load.samples * options.accumulate * options.gpus
    return Plan(
        subject=subject,
        options=options,
        load=load,
        memory=phase_bytes(subject, options, load, passes),
        flops={part: num_samples * flops for part, flops in per_sample.items()},
        gathered_bytes=_gathered_bytes(subject, options, passes) + _replica_bytes(subject, options, passes),
        replica_bytes=_replica_bytes(subject, options, passes),
        passes=passes,
    )


def num_prompts(config: DistillConfig) -> int:
    """Return the number of training prompts; num_captions while no prompts are named.

    Raises:
        ConfigError: the prompts cannot be read.
    """
    return len(load_prompts(config)) if config.prompts else config.num_captions


def suggest(subject: Subject, options: PlanOptions) -> Suggestion | None:
    """Find the smallest change of options that fits on the same GPUs; None when there is none.

    A change of what is trained weighs most (LoRA critic, then a bf16 teacher, then a bf16 residual stream), then
    checkpointing, then fewer replicas, then context parallelism, then accumulation.
    """
    for candidate, changed in _alternatives(subject, options):
        try:
            plan = make_plan(candidate, changed)
        except ConfigError:
            continue
        if plan.fits:
            return Suggestion(plan=plan, changes=_changes(subject, options, plan))
    return None


def smallest(subject: Subject, options: PlanOptions) -> Plan:
    """Return the plan that needs least memory among those that `suggest` tries and the requested one."""
    plans = [make_plan(subject, options)]
    for candidate, changed in _alternatives(subject, options):
        try:
            plans.append(make_plan(candidate, changed))
        except ConfigError:
            continue
    return max(plans, key=lambda plan: plan.headroom_bytes)


def _split(subject: Subject, options: PlanOptions) -> MicroBatch:
    degree, heads, tokens = options.context_parallel, _common_heads(subject), subject.num_tokens
    if heads % degree or tokens % degree:
        usable = [value for value in divisors(options.gpus) if heads % value == 0 and tokens % value == 0]
        raise ConfigError(
            f"{flag('context_parallel')} must divide {heads} heads and {tokens} tokens, got {degree}: "
            f"use one of {', '.join(str(value) for value in usable)}"
        )
    batch_size, groups = subject.config.batch_size, options.data_parallel * options.accumulate
    if batch_size % groups:
        shares = [value for value in divisors(batch_size) if value % options.data_parallel == 0]
        counts = " or ".join(str(share // options.data_parallel) for share in shares)
        advice = f"{flag('accumulate')} {counts}" if shares else f"fewer GPUs, a {flag('context_parallel')}"
        raise ConfigError(
            f"batch_size {batch_size} must split evenly over {options.data_parallel} data-parallel groups x "
            f"{options.accumulate} micro-batches: use {advice}, or --set batch_size={-(-batch_size // groups) * groups}"
        )
    for role in ("critic", "student"):
        width, rank = network_of(subject, options, role).architecture.dim, options.lora_rank(role)
        if rank > width:
            raise ConfigError(
                f"{flag(f'lora_{role}_rank')} must be at most the width {width}, "
                f"got {rank}: use 64, or 0 for a full {role}"
            )
    sequence = Sequence(tokens=tokens // degree, context_tokens=tokens, prompt_tokens=options.prompt_tokens)
    return MicroBatch(samples=batch_size // groups, sequence=sequence)


def _common_heads(subject: Subject) -> int:
    """Return the number of heads whose divisors divide those of all networks."""
    return math.gcd(*(subject.network(role).architecture.num_attention_heads for role in ("student", "teacher")))


def _sample_flops(
    subject: Subject, options: PlanOptions, load: MicroBatch, passes: Mapping[str, Passes]
) -> dict[str, float]:
    student, critic, teacher = (
        _network_flops(subject, load, options, role) for role in ("student", "critic", "teacher")
    )
    head, judges = subject.config.method_settings.critic_head(), network_of(subject, options, "critic").architecture
    sequence = role_load(subject, options, load, "critic").sequence
    return iteration_flops(
        student,
        critic,
        passes,
        teacher=teacher,
        is_guided=_is_guided(subject),
        checkpointing=options.activation_checkpointing,
        derivative=derivative_flops(subject.architecture, load.sequence),
        classifier=None if head is None else classifier_flops(judges, sequence, head, options.lora_critic_rank),
    )


def _network_flops(subject: Subject, load: MicroBatch, options: PlanOptions, role: str) -> NetworkFlops:
    sequence = role_load(subject, options, load, role).sequence
    return network_flops(network_of(subject, options, role).architecture, sequence, options.lora_rank(role))


def _is_guided(subject: Subject) -> bool:
    return subject.config.guidance_scale != 1.0


def _sampling_flops(subject: Subject, load: MicroBatch, options: PlanOptions) -> float:
    """Count the operations of the teacher's samples, of the run's and of its start's: each group makes its share."""
    forward = _network_flops(subject, load, options, "teacher").forward * (2 if _is_guided(subject) else 1)
    forwards = sum(
        (sampling.num_samples or num_prompts(subject.config)) * (len(sampling.sigmas()) - 1)
        for config in (subject.config, start_of(subject.config))
        if config is not None and (sampling := METHODS[config.method].teacher_sampling(config)) is not None
    )
    return forwards * forward / options.data_parallel


def _gathered_bytes(subject: Subject, options: PlanOptions, passes: Mapping[str, Passes]) -> float:
    """Count what comes from the own replica.

    Every forward and every backward gathers the blocks once; a backward also reduces float32 gradients, or that of the
    last micro-batch alone.
    """
    config, width = subject.config, dict[str, float]()
    for role in ("student", "critic", "teacher"):
        network = network_of(subject, options, role)
        blocks = network.architecture.num_layers * network.parameters.block
        width[role] = blocks * DTYPE_BYTES[config.gather_precision(role, precision_of(config))]
    head, num_layers = (
        config.method_settings.critic_head(),
        network_of(subject, options, "critic").architecture.num_layers,
    )
    read = 0.0 if head is None else head_blocks(num_layers, head) / num_layers
    num_reductions = 1 if options.gradient_sync == "last" else options.accumulate
    received = 0.0
    for role, trained in trained_counts(subject, options).items():
        own = passes[role]
        calls = {"student": own.student + own.derivatives, "critic": own.critic, "teacher": own.teacher}
        calls[role] += 2 * own.trained
        # The discriminator gathers the blocks that it reads, once forward and once backward.
        calls["critic"] += 2 * read * (own.judged + own.classified)
        reduced = 4 * (own.trained + read * own.classified) * trained
        gathered = options.accumulate * sum(count * width[name] for name, count in calls.items())
        received += own.turns * (gathered + num_reductions * reduced)
    return received * (options.shards - 1) / options.shards


def _replica_bytes(subject: Subject, options: PlanOptions, passes: Mapping[str, Passes]) -> float:
    """Count an all-reduce of float32 gradients over the replicas, once per update: two passes around a ring."""
    num_replicas = options.gpus // options.shards
    reduced = sum(passes[role].turns * trained for role, trained in trained_counts(subject, options).items())
    return 2 * 4 * reduced / options.shards * (num_replicas - 1) / num_replicas


def _alternatives(subject: Subject, options: PlanOptions) -> Iterator[tuple[Subject, PlanOptions]]:
    config = subject.config
    teachers = [config.teacher_dtype]
    if precision_of(config) == "bf16" and config.precision != "fp32":
        teachers.append("bf16")
    residuals = [config.residual_dtype, *teachers[1:]]
    ranks = [options.lora_critic_rank]
    if not options.lora_critic_rank and subject.architecture.dim >= SUGGESTED_LORA_RANK:
        ranks.append(SUGGESTED_LORA_RANK)
    for rank, teacher, residual, checkpointing, shard_group, sync, degree, accumulate in itertools.product(
        ranks,
        dict.fromkeys(teachers),
        dict.fromkeys(residuals),
        dict.fromkeys([options.activation_checkpointing, True]),
        dict.fromkeys([options.shard_group, 0]),
        dict.fromkeys([options.gradient_sync, "each"]),
        [degree for degree in divisors(options.gpus) if degree >= options.context_parallel],
        [count for count in divisors(config.batch_size) if count >= options.accumulate],
    ):
        changed = dataclasses.replace(config, teacher_dtype=teacher, residual_dtype=residual)
        yield (
            dataclasses.replace(subject, config=changed),
            dataclasses.replace(
                options,
                lora_critic_rank=rank,
                activation_checkpointing=checkpointing,
                shard_group=shard_group,
                gradient_sync=sync,
                context_parallel=degree,
                accumulate=accumulate,
            ),
        )


def _changes(subject: Subject, options: PlanOptions, plan: Plan) -> tuple[str, ...]:
    changes = []
    for name in LAYOUT:
        value = getattr(plan.options, name)
        if value != getattr(options, name):
            changes.append(flag(name) if value is True else f"{flag(name)} {value}")
    before, after = subject.config, plan.subject.config
    for name in ("teacher_dtype", "residual_dtype"):
        if getattr(before, name) != getattr(after, name):
            changes.append(f"--set {name}={getattr(after, name)}")
    return tuple(changes)
