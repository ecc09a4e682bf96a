"""The memory of the CoDMD authors' training layout on the same GPUs, and what our layout saves; pure arithmetic.

Sizes are derived from their code, not measured on their machine.
"""

from dataclasses import dataclass

from distill.methods.registry import METHODS
from distill.plan.activations import block_bytes, input_bytes
from distill.plan.architecture import Subject
from distill.plan.flops import Sequence
from distill.plan.options import GIB, PlanOptions, divisors

UMT5_XXL_PARAMETERS = 5_680_910_336
# Their FSDP wraps modules of this size or more.
WRAP_PARAMETERS = 50_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceLayout:
    """Bytes of one GPU by part, and what each difference of our layout would save."""

    parts: dict[str, int]
    savings: dict[str, int]
    samples: int
    gpus: int
    gpu_bytes: int

    @property
    def total(self) -> int:
        """Return the bytes of one GPU."""
        return sum(self.parts.values())

    @property
    def headroom_bytes(self) -> int:
        """Return the free bytes of a GPU; negative when it does not fit."""
        return self.gpu_bytes - self.total


def reference_layout(subject: Subject, options: PlanOptions) -> ReferenceLayout | None:
    """Compute the authors' layout of a published recipe; None for a recipe, method or teacher that they do not have.

    Args:
        subject: settings and network.
        options: gives the GPUs and their memory; everything else is the authors' own.

    Source: CoDMD@6a8259b: three networks and the text encoder in float32, sharded by FSDP1 over all GPUs and computed
    in bfloat16; AdamW with both moments for student and full critic; gradients of the student kept until its next
    turn; blocks checkpointed; no context parallelism, no accumulation, no EMA.
    """
    samples = METHODS[subject.config.method].authors_samples(subject.config)
    if samples is None or subject.teacher is not None:
        return None
    architecture, parameters = subject.architecture, subject.parameters
    sequence = Sequence(
        tokens=subject.num_tokens, context_tokens=subject.num_tokens, prompt_tokens=options.prompt_tokens
    )
    network = 4 * parameters.total // options.gpus
    # All of their residual stream and of their norms is bfloat16: half the bytes of the float32 forms.
    inputs = samples * architecture.num_layers * input_bytes(architecture, sequence) // 2
    block = samples * (block_bytes(architecture, sequence, "fp32") - input_bytes(architecture, sequence)) // 2
    # They wrap modules above a size. A block of the 1.3B is smaller, so its network is one group; a layer of the 14B is
    # larger.
    group = architecture.dim * architecture.ffn_dim if parameters.block >= WRAP_PARAMETERS else parameters.total
    copies = (2 + 2 + 4) * group if options.gpus > 1 else 2 * parameters.total
    parts = {
        "weights: student, critic, teacher, all fp32": 3 * network,
        "weights: text encoder, fp32, resident": 4 * UMT5_XXL_PARAMETERS // options.gpus,
        "optimizer: two moments, two networks": 4 * network,
        "gradients: critic's, and the student's kept between its turns": 2 * network,
        "activations: inputs of checkpointed blocks, bf16": inputs,
        "working set: one block computed again": block,
        "weight copies: gathered group, its gradient and reduction": copies,
        "reserve": round(options.reserve_gib * GIB),
    }
    heads, tokens = architecture.num_attention_heads, subject.num_tokens
    degree = max(value for value in divisors(options.gpus) if heads % value == 0 and tokens % value == 0)
    savings = {
        "teacher in bf16": network // 2,
        "text embeddings cached, no text encoder": 4 * UMT5_XXL_PARAMETERS // options.gpus,
        "gradients freed after each update": network,
        "LoRA critic on the teacher's weights": 4 * network,
    }
    if degree > 1:
        savings[f"context parallel {degree}"] = (inputs + block) - (inputs + block) // degree
    return ReferenceLayout(
        parts=parts,
        savings=savings,
        samples=samples,
        gpus=options.gpus,
        gpu_bytes=round(options.gpu_gib * GIB),
    )
