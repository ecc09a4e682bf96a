"""Floating-point operations of a Wan transformer and of a training iteration, in closed form; computes no tensor.

A multiplication and an addition count 2, as in torch.utils.flop_counter; only matrix products, convolutions and
attention are counted.

Legend: S tokens on this GPU, N tokens of the whole sample (S times the context-parallel
degree), T prompt positions, d width, f width of the feed-forward, n blocks, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distill.networks.head import head_blocks
from distill.settings import HeadConfig

if TYPE_CHECKING:
    from distill.methods.draws import Passes
    from distill.plan.architecture import Architecture

# Products of S x N x d: scores and values forward; backward the scores once more, then one for each of four gradients.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """Sequence lengths of one network: tokens on this GPU, tokens of the whole sample, prompt positions."""

    tokens: int
    context_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkFlops:
    """Operations of one sample on one GPU.

    Attributes:
        recomputation: the second forward of the blocks with activation checkpointing.
    """

    forward: float
    backward: float
    recomputation: float


def network_flops(architecture: "Architecture", sequence: Sequence, lora_rank: int = 0) -> NetworkFlops:
    """Count one sample's pass through a network.

    Args:
        architecture: sizes of the network.
        sequence: lengths on one GPU.
        lora_rank: 0 trains every parameter; otherwise only LoRA factors of this rank on all linear layers of the
            blocks, on frozen weights.

    Returns:
        Operations of one sample on one GPU. Backward gives no gradient to latents or text embeddings.
    """
    a, d, f, n = architecture, architecture.dim, architecture.ffn_dim, architecture.num_layers
    s, t = sequence.tokens, sequence.prompt_tokens
    on_tokens = 2.0 * s * (6 * d * d + 2 * d * f)  # self q, k, v, out; cross q, out; feed-forward up, down
    on_prompt = 2.0 * t * 2 * d * d  # cross k, v
    attention = 4.0 * s * (sequence.context_tokens + t) * d
    lora = 2.0 * lora_rank * (s * (14 * d + 2 * f) + 4 * t * d)
    patch, head = (2.0 * s * d * channels * a.patch_volume for channels in (a.in_channels, a.out_channels))
    # First layers, whose inputs need no gradient, and the layers after them.
    first = 2.0 * (a.freq_dim * d + t * a.text_dim * d)
    later = 2.0 * (7 * d * d + t * d * d)
    blocks = n * (on_tokens + on_prompt + attention + lora)
    if lora_rank:
        # Frozen layers pass gradients on but have none; the first block's q, k, v have nothing to pass them to.
        backward = n * (on_tokens + ATTENTION_BACKWARD * attention + 2 * lora) - 6.0 * s * d * d + head
    else:
        backward = n * (2 * (on_tokens + on_prompt) + ATTENTION_BACKWARD * attention)
        backward += patch + 2 * head + first + 2 * later
    return NetworkFlops(forward=blocks + patch + head + first + later, backward=backward, recomputation=blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierFlops:
    """Operations of a discriminator on one sample and one GPU: a head on the critic's first blocks.

    Attributes:
        forward: of the blocks that it reads and of the head.
        judging: a backward that gives gradient to the sample alone.
        training: a backward that gives gradient to all parameters.
        recomputation: the second forward of the blocks with activation checkpointing.
    """

    forward: float = 0.0
    judging: float = 0.0
    training: float = 0.0
    recomputation: float = 0.0


def classifier_flops(
    architecture: "Architecture", sequence: Sequence, head: HeadConfig, lora_rank: int = 0
) -> ClassifierFlops:
    """Count one sample's pass through a discriminator.

    Args:
        architecture: sizes of the critic.
        sequence: lengths on one GPU.
        head: of the critic.
        lora_rank: of a LoRA critic; 0 for a full one.
    """
    part = replace(architecture, num_layers=head_blocks(architecture.num_layers, head))
    a, d, f, n = part, part.dim, part.ffn_dim, part.num_layers
    s, t = sequence.tokens, sequence.prompt_tokens
    own = network_flops(part, sequence, lora_rank)
    # Queries on tokens, and the pooling that follows: the gradient of either product goes to both of its sides.
    pooling = 2.0 * s * d * head.queries
    layers = 2.0 * (head.queries * d * head.width + head.width)
    attention = ATTENTION_BACKWARD * 4.0 * s * (sequence.context_tokens + t) * d
    on_tokens = 2.0 * s * (6 * d * d + 2 * d * f)
    patch, projection = (2.0 * s * d * channels * a.patch_volume for channels in (a.in_channels, a.out_channels))
    lora = 2.0 * lora_rank * s * (14 * d + 2 * f)
    return ClassifierFlops(
        # The transformer's last projection runs too; nothing depends on it.
        forward=own.forward + 2 * pooling + layers,
        judging=n * (on_tokens + attention + lora) + patch + 3 * pooling + layers,
        training=own.backward - (projection if lora_rank else 2 * projection) + 4 * pooling + 2 * layers,
        recomputation=own.recomputation,
    )


def derivative_flops(architecture: "Architecture", sequence: Sequence) -> float:
    """Count one sample's forward-mode derivative along latents and timestep, the forward itself included.

    Whatever depends on them is multiplied three times: the product rule has two terms beside the product, and torch
    computes the one with the zero tangent of a weight too. The prompt's own layers are applied once.
    """
    a, d, n = architecture, architecture.dim, architecture.num_layers
    on_prompt = 2.0 * sequence.prompt_tokens * (a.text_dim * d + d * d + n * 2 * d * d)
    return 3 * (network_flops(architecture, sequence).forward - on_prompt) + on_prompt


def iteration_flops(
    student: NetworkFlops,
    critic: NetworkFlops,
    passes: Mapping[str, "Passes"],
    *,
    is_guided: bool,
    checkpointing: bool,
    derivative: float = 0.0,
    classifier: ClassifierFlops | None = None,
    teacher: NetworkFlops | None = None,
) -> dict[str, float]:
    """Count one sample's share of a mean iteration.

    Args:
        student: passes of the student.
        critic: passes of the critic.
        passes: of the method, by role.
        is_guided: the teacher also sees the negative prompt.
        checkpointing: blocks are recomputed before their backward.
        derivative: of one forward-mode derivative of the student.
        classifier: of the critic as a discriminator, where it has a head.
        teacher: passes of the teacher; None where they are the student's.

    Returns:
        Operations by part, in the order in which they happen.
    """
    own, other = passes["student"], passes["critic"]
    again = 1.0 if checkpointing else 0.0
    evaluations = own.turns * own.teacher + other.turns * other.teacher
    student_graphs, critic_graphs = own.turns * own.trained, other.turns * other.trained
    judge = classifier or ClassifierFlops()
    again_judged = judge.forward + again * judge.recomputation
    judged, classified = own.turns * own.judged, other.turns * other.classified
    return {
        "rollout": (own.turns * own.student + other.turns * other.student) * student.forward,
        "derivative": own.turns * own.derivatives * derivative,
        "student forward": student_graphs * student.forward,
        "critic forward": (own.turns * own.critic + other.turns * other.critic + critic_graphs) * critic.forward,
        "teacher": evaluations * (2 if is_guided else 1) * (teacher or student).forward,
        "discriminator": judged * (again_judged + judge.judging) + classified * (again_judged + judge.training),
        "student backward": student_graphs * student.backward,
        "critic backward": critic_graphs * critic.backward,
        "recomputation": again * (student_graphs * student.recomputation + critic_graphs * critic.recomputation),
    }
