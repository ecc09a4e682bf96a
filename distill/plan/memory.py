"""Memory of one GPU in each phase of an iteration, part by part; pure arithmetic.

Knows sizes, not tensors: what a network keeps comes from activations.py, parameters from architecture.py, and what a
method runs from its `Passes`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from distill.config import DistillConfig
from distill.methods.draws import Passes
from distill.networks.head import head_blocks, head_parameters
from distill.plan.activations import (
    backward_working_bytes,
    block_bytes,
    classifier_bytes,
    derivative_working_bytes,
    forward_working_bytes,
    head_bytes,
    input_bytes,
    rotation_bytes,
    saved_bytes,
)
from distill.plan.architecture import Architecture, Network, Subject
from distill.plan.flops import Sequence
from distill.plan.options import DTYPE_BYTES, GIB, PlanOptions

MEMORY_PARTS = (
    "student weights",
    "critic weights",
    "teacher weights",
    "optimizer",
    "EMA",
    "gradients",
    "activations",
    "working set",
    "weight copies",
    "latents and text",
    "reserve",
)
PHASES = ("student scores", "student backward", "student update", "critic backward", "critic update")
# Float32 latents of a batch alive beside the noise while a network runs: the student's sample, the noisy state, the
# critic's flow, and the state twice more for the guided teacher.
LATENT_TENSORS = 5
# The same without scores, as in a regression: the noisy state and the prediction.
PLAIN_LATENT_TENSORS = 2
# torch.optim.AdamW allocates both moments whatever betas are.
NUM_MOMENTS = 2

MemoryByPhase = dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """A micro-batch of one GPU: its number of samples, and the sequence lengths of each."""

    samples: int
    sequence: Sequence


def precision_of(config: DistillConfig) -> str:
    """Return fp32 or bf16; "auto" is bf16, which every GPU that is planned for multiplies natively."""
    return "fp32" if config.precision == "fp32" else "bf16"


def residual_of(config: DistillConfig) -> str:
    """Return the dtype of the residual stream, fp32 or bf16."""
    return config.residual_dtype if precision_of(config) == "bf16" else "fp32"


def trained_counts(subject: Subject, options: PlanOptions) -> dict[str, int]:
    """Return the numbers of trained parameters of student and critic, a discriminator's head included."""
    counts, head = {}, subject.config.method_settings.critic_head()
    for role in ("student", "critic"):
        network = network_of(subject, options, role)
        rank, parameters = options.lora_rank(role), network.parameters
        counts[role] = rank * parameters.lora_width if rank else parameters.total
        if role == "critic" and head is not None:
            counts[role] += head_parameters(network.architecture.dim, head)
    return counts


def network_of(subject: Subject, options: PlanOptions, role: str) -> Network:
    """Return the network of a role."""
    return subject.network(role, options.lora_critic_rank)


def role_load(subject: Subject, options: PlanOptions, load: MicroBatch, role: str) -> MicroBatch:
    """Return a micro-batch of the base with the sequence lengths of a role's network."""
    own, base = subject.num_tokens_of(role, options.lora_critic_rank), subject.num_tokens
    sequence = load.sequence
    scaled = replace(
        sequence, tokens=sequence.tokens * own // base, context_tokens=sequence.context_tokens * own // base
    )
    return replace(load, sequence=scaled)


def state_bytes(
    subject: Subject, options: PlanOptions, roles: tuple[str, ...] = ("student", "critic")
) -> dict[str, int]:
    """Return the persistent bytes of one GPU: weights, optimizer moments of the trained roles, EMA."""
    trained, master = trained_counts(subject, options), DTYPE_BYTES[options.master_dtype]
    student = master * trained["student"]
    if options.lora_student_rank:
        student += _frozen_bytes(subject, "student")
    whole = {
        "student weights": student,
        "critic weights": master * trained["critic"],
        "teacher weights": _frozen_bytes(subject, "teacher"),
        "optimizer": NUM_MOMENTS * master * sum(trained[role] for role in roles),
        "EMA": 4 * trained["student"],
    }
    return {part: -(-size // options.shards) for part, size in whole.items()}


def _frozen_bytes(subject: Subject, role: str) -> int:
    parameters, dtype = subject.network(role).parameters, subject.config.frozen_dtype(role)
    kept = 2 * parameters.kept_fp32 if dtype == "bf16" else 0
    return DTYPE_BYTES[dtype] * parameters.total + kept


def phase_bytes(
    subject: Subject, options: PlanOptions, load: MicroBatch, passes: Mapping[str, Passes]
) -> MemoryByPhase:
    """Return the peak memory of one GPU in each phase, by part.

    Args:
        subject: settings and network.
        options: machine and layout.
        load: one micro-batch on one GPU.
        passes: of the method, by role.

    Returns:
        Bytes for all PHASES and MEMORY_PARTS. In "student scores", critic and teacher evaluate a sample whose graph is
        held, or the student's forward-mode derivative is taken. A backward peaks at its start (all activations) or at
        its end (all gradients). The fused AdamW of an update has no temporary.
    """
    # A role without turns, as the critic of a plain consistency model, has weights and nothing else.
    roles = tuple(role for role in ("student", "critic") if passes[role].turns > 0)
    always = {
        **dict.fromkeys(MEMORY_PARTS, 0),
        **state_bytes(subject, options, roles),
        "latents and text": _data_bytes(subject, options, load, passes),
        "reserve": round(options.reserve_gib * GIB),
    }
    moments: dict[str, list[dict[str, int]]] = {phase: [{}] for phase in PHASES}
    moments["student scores"] = _score_moments(subject, options, load, passes["student"])
    for role in roles:
        moments[f"{role} backward"] = _backward_moments(subject, options, load, role, passes[role])
        moments[f"{role} update"] = [{"gradients": _gradient_bytes(subject, options, role)}]
    worst = {phase: max(moments[phase], key=lambda parts: sum(parts.values())) for phase in PHASES}
    return {phase: {**always, **worst[phase]} for phase in PHASES}


def copy_bytes(subject: Subject, options: PlanOptions, role: str, *, is_backward: bool) -> int:
    """Return the bytes of temporary weights in a network's pass: all-gathered shards, or autocast's bf16 copies.

    Sharded, `DistillConfig.gather_precision` gives the dtype. In fp32 three blocks are held. Forward: the block being
    freed, the buffer that gathers the next one, and the copy out of that buffer. Backward: the block that computes, the
    next one, and the gradient of the one before, with a copy of the gradient being reduced. In bf16 a block is gathered
    in two groups, and the small one between two large ones lets a block be freed before the next arrives: two blocks
    forward; backward the next one and a gradient, with its float32 copy being reduced. The layers around the blocks
    stay gathered in float32, as the time path needs. On one GPU autocast keeps its copies of trained weights through a
    forward and, without checkpointing, until the end of the backward.

    Source: FSDP2 as `distill.parallel.sharding.shard` sets it up, measured with torch 2.13.
    """
    network, config = network_of(subject, options, role), subject.config
    parameters, num_layers = network.parameters, network.architecture.num_layers
    rank, precision = options.lora_rank(role), precision_of(config)
    is_frozen = role == "teacher" or rank > 0
    if options.gpus > 1:
        gathered = config.gather_precision(role, precision)
        lora = rank * parameters.lora_width // num_layers
        outer = 4 * (parameters.total - num_layers * parameters.block)
        blocks = 2 if gathered == "bf16" else 3
        reduced = 4 * parameters.block if is_backward and not is_frozen else 0
        return blocks * DTYPE_BYTES[gathered] * (parameters.block + lora) + outer + reduced
    if is_frozen or precision == "fp32":
        return 0
    width = DTYPE_BYTES[precision]
    if is_backward and options.activation_checkpointing:
        return width * parameters.block
    return width * parameters.cast


def _score_moments(subject: Subject, options: PlanOptions, load: MicroBatch, own: Passes) -> list[dict[str, int]]:
    held_gradients = {"gradients": _held_gradient_bytes(subject, options, "student")}
    saved, samples = _saved(subject, options, load, "student"), load.samples
    precision, residual = precision_of(subject.config), residual_of(subject.config)
    # The teacher sees prompt and negative prompt in one call.
    factors = {"student": 1, "critic": 1, "teacher": 1 if subject.config.guidance_scale == 1.0 else 2}
    kept = own.graphs * _kept_copies(subject, options)
    calls = {"student": 1.0, "critic": own.critic, "teacher": own.teacher}
    moments = []
    for role, factor in factors.items():
        if not calls[role]:  # as the critic of a regression
            continue
        copies = copy_bytes(subject, options, role, is_backward=False)
        # A student that keeps its copies has counted them.
        copies = kept if role == "student" and kept else copies + kept
        architecture, own_load = (
            network_of(subject, options, role).architecture,
            role_load(subject, options, load, role),
        )
        working = samples * forward_working_bytes(architecture, own_load.sequence, precision, residual)
        parts = {"activations": own.graphs * saved, "working set": factor * working, "weight copies": copies}
        moments.append(held_gradients | parts)
    if own.derivatives:
        derivative = samples * derivative_working_bytes(subject.architecture, load.sequence)
        gathered = copy_bytes(subject, options, "student", is_backward=False) if options.gpus > 1 else 0
        copies = gathered + _kept_copies(subject, options)
        moments.append(held_gradients | {"activations": saved, "working set": derivative, "weight copies": copies})
    if own.judged:
        moments.append(held_gradients | _judging(subject, options, load, own.graphs * saved, kept))
    if own.token_plans:
        _, frames, height, width = subject.latents
        tokens = height * width // math.gcd(height, 2) // math.gcd(width, 2)
        plans = 4 * own.token_plans * frames * tokens * tokens
        moments.append(
            held_gradients | {"activations": own.graphs * saved, "working set": plans, "weight copies": kept}
        )
    return moments


def _judging(subject: Subject, options: PlanOptions, load: MicroBatch, held: int, kept: int) -> dict[str, int]:
    """Return the moment in which the discriminator's gradient for a sample is taken, the student's graph held."""
    own = role_load(subject, options, load, "critic")
    architecture, config = network_of(subject, options, "critic").architecture, subject.config
    precision, residual = precision_of(config), residual_of(config)
    working = own.samples * backward_working_bytes(architecture, own.sequence, precision, residual)
    if options.activation_checkpointing:
        working += _recomputed(architecture, own, config)
    return {
        "activations": held + _classifier_saved(subject, options, load),
        "working set": working,
        "weight copies": kept + copy_bytes(subject, options, "critic", is_backward=True),
    }


def _recomputed(architecture: Architecture, load: MicroBatch, config: DistillConfig) -> int:
    """Return what a block computed again keeps beside its input."""
    block = block_bytes(architecture, load.sequence, precision_of(config), residual_of(config))
    return load.samples * (block - input_bytes(architecture, load.sequence, residual_of(config)))


def _classifier_saved(subject: Subject, options: PlanOptions, load: MicroBatch) -> int:
    """Return the bytes that the discriminator keeps from forward to backward, 0 where there is none."""
    head, own = subject.config.method_settings.critic_head(), role_load(subject, options, load, "critic")
    if head is None:
        return 0
    architecture = network_of(subject, options, "critic").architecture
    part = replace(architecture, num_layers=head_blocks(architecture.num_layers, head))
    precision, residual = precision_of(subject.config), residual_of(subject.config)
    checkpointing = options.activation_checkpointing
    saved = classifier_bytes(part, own.sequence, precision, head.queries, residual, checkpointing=checkpointing)
    return own.samples * saved + rotation_bytes(architecture, own.sequence)


def _kept_copies(subject: Subject, options: PlanOptions) -> int:
    """Return the bytes of autocast's weight copies that one student graph keeps on one GPU."""
    if options.gpus > 1 or options.activation_checkpointing:
        return 0
    return copy_bytes(subject, options, "student", is_backward=False)


def _backward_moments(
    subject: Subject, options: PlanOptions, load: MicroBatch, role: str, own: Passes
) -> list[dict[str, int]]:
    graphs, architecture = own.graphs, network_of(subject, options, role).architecture
    precision, residual = precision_of(subject.config), residual_of(subject.config)
    sequence = role_load(subject, options, load, role).sequence
    rank = options.lora_rank(role)
    block = load.samples * block_bytes(architecture, sequence, precision, residual, lora_rank=rank)
    working = load.samples * backward_working_bytes(architecture, sequence, precision, residual)
    if options.activation_checkpointing:
        working += _recomputed(architecture, role_load(subject, options, load, role), subject.config)
        block = load.samples * input_bytes(architecture, sequence, residual)
    saved, copies = _saved(subject, options, load, role), copy_bytes(subject, options, role, is_backward=True)
    waiting = (graphs - 1) * _kept_copies(subject, options)
    head = load.samples * head_bytes(architecture, sequence)
    begin = {
        "working set": working,
        "weight copies": copies + waiting,
        "activations": graphs * saved - head,
        "gradients": _held_gradient_bytes(subject, options, role),
    }
    # The newest graph goes first; at its end the others are still held.
    end = {
        "working set": working,
        "weight copies": copies + waiting,
        "activations": (graphs - 1) * saved + block,
        # Of a micro-batch before the last, where whole gradients wait for it.
        "gradients": max(_gradient_bytes(subject, options, role), _held_gradient_bytes(subject, options, role)),
    }
    moments = [begin, end]
    gradients = {"working set": working, "weight copies": copies, "gradients": end["gradients"]}
    if own.trained > graphs:  # one graph after the other: the first has left its gradients
        moments.append(gradients | {"activations": saved - head})
    if own.classified:
        moments.append(gradients | {"activations": _classifier_saved(subject, options, load)})
    return moments


def _saved(subject: Subject, options: PlanOptions, load: MicroBatch, role: str) -> int:
    architecture = network_of(subject, options, role).architecture
    sequence = role_load(subject, options, load, role).sequence
    precision, residual = precision_of(subject.config), residual_of(subject.config)
    checkpointing, rank = options.activation_checkpointing, options.lora_rank(role)
    saved = saved_bytes(architecture, sequence, precision, residual, checkpointing=checkpointing, lora_rank=rank)
    return load.samples * saved + rotation_bytes(architecture, sequence)


def _gradient_bytes(subject: Subject, options: PlanOptions, role: str) -> int:
    return -(-DTYPE_BYTES[options.master_dtype] * trained_counts(subject, options)[role] // options.shards)


def _held_gradient_bytes(subject: Subject, options: PlanOptions, role: str) -> int:
    # The trainer frees gradients after each update, so only earlier micro-batches leave any.
    if options.accumulate == 1:
        return 0
    if options.gpus > 1 and options.gradient_sync == "last":
        # Not reduced yet, so not sharded either; FSDP2 adds them up in float32.
        return 4 * trained_counts(subject, options)[role]
    return _gradient_bytes(subject, options, role)


def _data_bytes(subject: Subject, options: PlanOptions, load: MicroBatch, passes: Mapping[str, Passes]) -> int:
    channels, frames, height, width = subject.latents
    # Every GPU of a context-parallel group has the whole latents: the network splits them. Noise is one per step and
    # one for the scores.
    kept = options.accumulate * max(one.kept_latents for one in passes.values())
    has_scores = any(one.teacher or one.critic for one in passes.values())
    alive = LATENT_TENSORS if has_scores else PLAIN_LATENT_TENSORS
    tensors = len(subject.config.grid().timesteps) + 1 + alive + kept
    if options.gpus * options.accumulate > 1:
        gathered = max(one.gathered_latents for one in passes.values())
        tensors += gathered * options.data_parallel * options.accumulate
    latents = tensors * channels * frames * height * width
    # Prompt and negative prompt, and the teacher's concatenation of both.
    text = 4 * load.sequence.prompt_tokens * subject.architecture.text_dim
    return 4 * load.samples * (latents + text)
