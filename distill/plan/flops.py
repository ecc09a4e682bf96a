"""Floating-point operations of a Wan transformer and of a training iteration, in closed form; standard library only.

A multiplication and an addition count 2, as in torch.utils.flop_counter; only matrix products, convolutions and
attention are counted.

Legend: S tokens on this GPU, N tokens of the whole sample (S times the context-parallel
degree), T prompt positions, d width, f width of the feed-forward, n blocks, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        teacher: passes of the teacher; None where they are the student's.

    Returns:
        Operations by part, in the order in which they happen.
    """
    own, other = passes["student"], passes["critic"]
    again = 1.0 if checkpointing else 0.0
    evaluations = own.turns * own.teacher + other.turns * other.teacher
    student_graphs, critic_graphs = own.turns * own.trained, other.turns * other.trained
    return {
        "rollout": (own.turns * own.student + other.turns * other.student) * student.forward,
        "derivative": own.turns * own.derivatives * derivative,
        "student forward": student_graphs * student.forward,
        "critic forward": (own.turns * own.critic + other.turns * other.critic + critic_graphs) * critic.forward,
        "teacher": evaluations * (2 if is_guided else 1) * (teacher or student).forward,
        "student backward": student_graphs * student.backward,
        "critic backward": critic_graphs * critic.backward,
        "recomputation": again * (student_graphs * student.recomputation + critic_graphs * critic.recomputation),
    }
