"""Memory of one GPU in each phase of an iteration, part by part; pure arithmetic.

Knows sizes, not tensors: what a network keeps comes from activations.py, parameters from architecture.py.
"""

from dataclasses import dataclass

from distill.config import DistillConfig, gather_precision
from distill.plan.activations import (
    backward_working_bytes,
    block_bytes,
    forward_working_bytes,
    head_bytes,
    input_bytes,
    rotation_bytes,
    saved_bytes,
)
from distill.plan.architecture import Subject
from distill.plan.flops import Sequence
from distill.plan.options import DTYPE_BYTES, GIB, PlanOptions

PARTS = (
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

Memory = dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one GPU computes at a time: samples of a micro-batch, and the lengths of each."""

    samples: int
    sequence: Sequence


def precision_of(config: DistillConfig) -> str:
    """Return fp32 or bf16; "auto" is bf16, which every GPU that is planned for multiplies natively."""
    return "fp32" if config.precision == "fp32" else "bf16"


def trained_parameters(subject: Subject, options: PlanOptions) -> dict[str, int]:
    """Return the numbers of trained parameters of student and critic."""
    rank, parameters = options.lora_critic_rank, subject.parameters
    return {"student": parameters.total, "critic": rank * parameters.lora_width if rank else parameters.total}


def num_moments(config: DistillConfig) -> int:
    """Return the state tensors of AdamW: betas[0] = 0 makes the first moment the gradient itself."""
    return 1 if config.optimizer.betas[0] == 0 else 2


def state_bytes(subject: Subject, options: PlanOptions) -> dict[str, int]:
    """Return what one GPU holds all the time: weights, moments, average."""
    config, parameters = subject.config, subject.parameters
    trained, master = trained_parameters(subject, options), DTYPE_BYTES[options.master_dtype]
    teacher = DTYPE_BYTES[config.teacher_dtype] * parameters.total
    if config.teacher_dtype == "bf16":
        teacher += 2 * parameters.kept_fp32
    whole = {
        "student weights": master * trained["student"],
        "critic weights": master * trained["critic"],
        "teacher weights": teacher,
        "optimizer": num_moments(config) * master * sum(trained.values()),
        "EMA": 4 * parameters.total,
    }
    return {part: -(-size // options.gpus) for part, size in whole.items()}


def phase_bytes(subject: Subject, options: PlanOptions, load: Load) -> Memory:
    """Return the memory of one GPU by phase and part, each phase at its worst moment.

    Args:
        subject: settings and network.
        options: machine and layout.
        load: one micro-batch on one GPU.

    Returns:
        Bytes for all PHASES and PARTS. In "student scores" critic and teacher look at a sample whose graph is held; a
        backward is at its worst where it begins (all activations) or ends (all gradients); an update also holds one
        temporary of the size of the trained parameters, as AdamW's default on CUDA does.
    """
    always = {
        **dict.fromkeys(PARTS, 0),
        **state_bytes(subject, options),
        "latents and text": _data_bytes(subject, load),
        "reserve": round(options.reserve_gib * GIB),
    }
    moments: dict[str, list[dict[str, int]]] = {"student scores": _score_moments(subject, options, load)}
    for role in ("student", "critic"):
        moments[f"{role} backward"] = _backward_moments(subject, options, load, role)
        trained = _gradient_bytes(subject, options, role)
        moments[f"{role} update"] = [{"gradients": trained, "working set": trained}]
    worst = {phase: max(moments[phase], key=lambda parts: sum(parts.values())) for phase in PHASES}
    return {phase: {**always, **worst[phase]} for phase in PHASES}


def copy_bytes(subject: Subject, options: PlanOptions, role: str, *, is_backward: bool) -> int:
    """Return the weights that a network's pass holds beside its own: gathered shards, or autocast's bf16 copies.

    Sharded, `gather_precision` says in what. In fp32 that is three blocks: in forward the one that is being let go, the
    buffer of the next one's gathering and what is copied out of it; in backward the one that computes, the next one,
    and the gradient of the one before, and then a copy of that which is being reduced. In bf16 blocks are gathered in
    two groups, and the small one in between lets the last block go before the next one comes: two blocks in forward;
    in backward the next one and a gradient, with its float32 copy that is being reduced. The layers around the blocks
    stay gathered, in float32 as the time path needs. On one GPU autocast keeps its copies of trained weights through a
    forward, and without checkpointing to the end of the backward.

    Source: FSDP2 as `distill.parallel.sharding.shard` sets it up, measured with torch 2.13.
    """
    parameters, config = subject.parameters, subject.config
    rank, precision = options.lora_critic_rank, precision_of(config)
    is_frozen = role == "teacher" or (role == "critic" and rank > 0)
    if options.gpus > 1:
        gathered = gather_precision(config.method, role, precision)
        lora = rank * parameters.lora_width // subject.architecture.num_layers if role == "critic" else 0
        outer = 4 * (parameters.total - subject.architecture.num_layers * parameters.block)
        blocks = 2 if gathered == "bf16" else 3
        reduced = 4 * parameters.block if is_backward and not is_frozen else 0
        return blocks * DTYPE_BYTES[gathered] * (parameters.block + lora) + outer + reduced
    if is_frozen or precision == "fp32":
        return 0
    width = DTYPE_BYTES[precision]
    if is_backward and options.activation_checkpointing:
        return width * parameters.block
    return width * parameters.cast


def _score_moments(subject: Subject, options: PlanOptions, load: Load) -> list[dict[str, int]]:
    held = {
        "activations": _saved(subject, options, load),
        "gradients": _held_gradient_bytes(subject, options, "student"),
    }
    working = load.samples * forward_working_bytes(subject.architecture, load.sequence, precision_of(subject.config))
    # The teacher sees prompt and negative prompt in one call.
    factors = {"student": 1, "critic": 1, "teacher": 1 if subject.config.guidance_scale == 1.0 else 2}
    kept = 0
    if options.gpus == 1 and not options.activation_checkpointing:
        kept = copy_bytes(subject, options, "student", is_backward=False)
    moments = []
    for role, factor in factors.items():
        copies = copy_bytes(subject, options, role, is_backward=False)
        # The student's own copies are those it keeps.
        copies += 0 if role == "student" else kept
        moments.append({**held, "working set": factor * working, "weight copies": copies})
    return moments


def _backward_moments(subject: Subject, options: PlanOptions, load: Load, role: str) -> list[dict[str, int]]:
    architecture, sequence, precision = subject.architecture, load.sequence, precision_of(subject.config)
    block = load.samples * block_bytes(architecture, sequence, precision)
    working = load.samples * backward_working_bytes(architecture, sequence, precision)
    if options.activation_checkpointing:
        working += block - load.samples * input_bytes(architecture, sequence)
        block = load.samples * input_bytes(architecture, sequence)
    common = {"working set": working, "weight copies": copy_bytes(subject, options, role, is_backward=True)}
    return [
        {
            **common,
            "activations": _saved(subject, options, load) - load.samples * head_bytes(architecture, sequence),
            "gradients": _held_gradient_bytes(subject, options, role),
        },
        {**common, "activations": block, "gradients": _gradient_bytes(subject, options, role)},
    ]


def _saved(subject: Subject, options: PlanOptions, load: Load) -> int:
    architecture, sequence = subject.architecture, load.sequence
    precision, checkpointing = precision_of(subject.config), options.activation_checkpointing
    saved = saved_bytes(architecture, sequence, precision, checkpointing=checkpointing)
    return load.samples * saved + rotation_bytes(architecture, sequence)


def _gradient_bytes(subject: Subject, options: PlanOptions, role: str) -> int:
    return -(-DTYPE_BYTES[options.master_dtype] * trained_parameters(subject, options)[role] // options.gpus)


def _held_gradient_bytes(subject: Subject, options: PlanOptions, role: str) -> int:
    # The trainer frees gradients after each update, so only earlier micro-batches leave any.
    return _gradient_bytes(subject, options, role) if options.accumulate > 1 else 0


def _data_bytes(subject: Subject, load: Load) -> int:
    channels, frames, height, width = subject.latents
    # Every GPU of a context-parallel group has the whole latents: the network splits them. Noise is one per step and
    # one for the scores.
    latents = (len(subject.config.grid().timesteps) + 1 + LATENT_TENSORS) * channels * frames * height * width
    # Prompt and negative prompt, and the teacher's concatenation of both.
    text = 4 * load.sequence.prompt_tokens * subject.architecture.text_dim
    return 4 * load.samples * (latents + text)
