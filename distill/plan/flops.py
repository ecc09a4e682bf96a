"""Floating-point operations of a Wan transformer and of a training iteration, in closed form; standard library only.

A multiplication and an addition count 2, as in torch.utils.flop_counter; only matrix products, convolutions and
attention are counted. Letters: S tokens on this GPU, N tokens of the whole sample (S times the context-parallel
degree), T prompt positions, d width, f width of the feed-forward, n blocks, r rank.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.plan.architecture import Architecture

# Products of S x N x d: scores and values forward; backward the scores once more, then one for each of four gradients.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """Lengths that one network sees: tokens on this GPU, tokens of the whole sample, prompt positions."""

    tokens: int
    context_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkFlops:
    """Operations of one sample on one GPU: forward; backward after it; the blocks' second forward of checkpointing."""

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


def iteration_flops(
    student: NetworkFlops,
    critic: NetworkFlops,
    *,
    num_steps: int,
    student_every_steps: int,
    is_guided: bool,
    checkpointing: bool,
) -> dict[str, float]:
    """Count one sample's share of a mean iteration: the critic's turn, and every so often the student's.

    Args:
        student: passes of the student; the teacher's forward is the same.
        critic: passes of the critic.
        num_steps: steps of the student; a rollout stops at one of them, drawn uniformly.
        student_every_steps: iterations per student turn.
        is_guided: the teacher also sees the negative prompt.
        checkpointing: blocks are computed again before their backward.

    Returns:
        Operations by part, in the order in which they happen.
    """
    share = 1.0 / student_every_steps
    steps_before_exit = (num_steps - 1) / 2
    again = 1.0 if checkpointing else 0.0
    return {
        "rollout": (steps_before_exit * share + steps_before_exit + 1) * student.forward,
        "student forward": share * student.forward,
        "critic forward": (1 + share) * critic.forward,
        "teacher": share * (2 if is_guided else 1) * student.forward,
        "student backward": share * student.backward,
        "critic backward": critic.backward,
        "recomputation": again * (share * student.recomputation + critic.recomputation),
    }
