"""Bytes of activations of a Wan transformer in training, in closed form; standard library only.

The forms count what autograd keeps of diffusers' WanTransformer3DModel as `distill.networks.build` calls it: in
float32, or under bf16 autocast with a residual stream of either dtype, float32 QK norms and compact cross-attention.
Attention is a fused kernel, which keeps its inputs, its output and one log-sum-exp per head; nothing of S x S exists,
except in `derivative_working_bytes`.

Legend: S tokens on this GPU, T prompt positions, d width, f width of the feed-forward, H heads.

The forms hold for eager mode; a compiled block keeps less. RMS norms are counted as the composite that CPUs run; CUDA's
fused one keeps 12 S d bytes less per block.
"""

from typing import TYPE_CHECKING

from distill.plan.flops import Sequence

if TYPE_CHECKING:
    from distill.plan.architecture import Architecture


def block_bytes(
    architecture: "Architecture", sequence: Sequence, precision: str, residual: str = "fp32", *, lora_rank: int = 0
) -> int:
    """Return the bytes that one block keeps for its backward, for one sample, its input included.

    Source: counted on diffusers 0.42 with saved_tensors_hooks, tensor by tensor; bytes per token and unit of width in
    float32, then under bf16 autocast:

        self-attention    input 4, 4; its norm 4, 4; the modulated input once 4, in bf16 for each of q, k, v 6;
                          q and k before and after their norm 16, 16; rotated q, k and v 12, 6; output 4, 2;
                          its projection, for the gate 4, 2
        cross-attention   input 4, 4; its norm, the input of q 4, 2; q before, after, and scaled by its norm 12, 10;
                          output 4, 2
        feed-forward      input 4, 4; its norm 4, 4; the modulated input 4, 2; output, for the gate 4, 4;
                          and f / d times the values before and after GELU 8, 4

    with k (three times) and v of the prompt, 16 or 12 bytes each position, nine statistics of norms and two
    log-sum-exps for every head. A bf16 residual stream takes 4 bytes less: its inputs take 2, their float32 casts for
    norms come on top, and q, k and v share one modulated input.

    With adapters on frozen weights, norms and modulation have no gradient, so what they would multiply is not kept: 28
    d less in float32, 24 d in bf16. The eight adapters on tokens keep their `lora_rank` values.
    """
    d, f = architecture.dim, architecture.ffn_dim
    is_wide = precision == "fp32"
    token = (88 * d + 8 * f) if is_wide else ((68 if residual == "bf16" else 72) * d + 4 * f)
    if lora_rank:
        token += (32 * lora_rank - 28 * d) if is_wide else (16 * lora_rank - 24 * d)
    statistics = 4 * 9 + 4 * 2 * architecture.num_attention_heads
    prompt = (16 if is_wide else 12) * d + 4
    return sequence.tokens * (token + statistics) + sequence.prompt_tokens * prompt


def input_bytes(architecture: "Architecture", sequence: Sequence, residual: str = "fp32") -> int:
    """Return the size of one block's input, for one sample: the residual stream, fp32 or bf16."""
    return (2 if residual == "bf16" else 4) * sequence.tokens * architecture.dim


def outer_bytes(architecture: "Architecture", sequence: Sequence, precision: str) -> int:
    """Return the bytes that the layers around the blocks keep, for one sample: patches, text, last norm, projection."""
    a, d = architecture, architecture.dim
    width = 4 if precision == "fp32" else 2
    patches = 4 * sequence.tokens * a.in_channels * a.patch_volume
    return patches + sequence.prompt_tokens * width * (a.text_dim + 3 * d) + head_bytes(a, sequence)


def head_bytes(architecture: "Architecture", sequence: Sequence) -> int:
    """Return the share of the last norm and projection, for one sample; freed before any block's backward."""
    return sequence.tokens * (3 * 4 * architecture.dim + 2 * 4)


def rotation_bytes(architecture: "Architecture", sequence: Sequence) -> int:
    """Return the size of the float32 tables of the rotary embedding, which all samples and blocks share."""
    return 2 * 4 * sequence.tokens * architecture.attention_head_dim


def saved_bytes(
    architecture: "Architecture",
    sequence: Sequence,
    precision: str,
    residual: str = "fp32",
    *,
    checkpointing: bool,
    lora_rank: int = 0,
) -> int:
    """Return the bytes that a network keeps from forward to backward, for one sample.

    Args:
        architecture: sizes of the network.
        sequence: lengths on one GPU.
        precision: "fp32", or "bf16" for autocast.
        residual: dtype of the residual stream.
        checkpointing: keep only the input of each block.
        lora_rank: of adapters on frozen weights; 0 trains every parameter.

    Returns:
        Bytes; neither casts of weights nor the tables of rotation.
    """
    if checkpointing:
        block = input_bytes(architecture, sequence, residual)
    else:
        block = block_bytes(architecture, sequence, precision, residual, lora_rank=lora_rank)
    # Frozen layers around the blocks keep nothing for their weights.
    outer = head_bytes(architecture, sequence) if lora_rank else outer_bytes(architecture, sequence, precision)
    return architecture.num_layers * block + outer


def classifier_bytes(
    architecture: "Architecture",
    sequence: Sequence,
    precision: str,
    queries: int,
    residual: str = "fp32",
    *,
    checkpointing: bool,
) -> int:
    """Return the bytes that a discriminator keeps from forward to backward, for one sample.

    Args:
        architecture: sizes of the critic, with the blocks that its head reads.
        sequence: lengths on one GPU.
        precision: "fp32", or "bf16" for autocast.
        queries: of the head.
        residual: dtype of the residual stream.
        checkpointing: keep only the input of each block.

    Returns:
        Bytes; neither casts of weights nor the tables of rotation. Of the head, the features, their norm, and scores,
        softmax and pooled tokens; the transformer's own last norm and projection keep nothing.
    """
    whole = saved_bytes(architecture, sequence, precision, residual, checkpointing=checkpointing)
    own = sequence.tokens * (2 * 4 * architecture.dim + 4 * queries)
    return whole - head_bytes(architecture, sequence) + own


def forward_working_bytes(
    architecture: "Architecture", sequence: Sequence, precision: str, residual: str = "fp32"
) -> int:
    """Return the peak bytes of one block in a forward without gradient, for one sample, input included.

    It is reached in the rotation of q or k (float32: input, modulated input, q, k, v, the rotated half and its terms),
    in the norm of cross-attention's q (bf16: input, residual, normed residual, self-attention's output, q, and the
    norm's own three), or in GELU (input, residual, modulated residual, cross-attention's output, both sides of GELU).
    What context parallelism exchanges around attention stays below that. A bf16 residual stream saves 2 bytes in each
    of the three tensors that follow it.
    """
    d, f = architecture.dim, architecture.ffn_dim
    if precision == "fp32":
        return sequence.tokens * max(30 * d, 16 * d + 8 * f)
    narrow = 6 * d if residual == "bf16" else 0
    return sequence.tokens * (max(28 * d, 14 * d + 4 * f) - narrow)


def derivative_working_bytes(architecture: "Architecture", sequence: Sequence) -> int:
    """Return the peak bytes of the student's forward-mode derivative, for one sample, input included.

    It runs in float32 with attention as plain matrix products, which have a derivative: five matrices of tokens x
    tokens for every head, of scores, softmax and their tangents. At Wan's size they are most of the memory of a run.
    Otherwise the worst moment is in a norm, or in GELU, where everything has a tangent beside it.

    Source: counted on diffusers 0.42 operator by operator.
    """
    d, f, heads = architecture.dim, architecture.ffn_dim, architecture.num_attention_heads
    return sequence.tokens * max(20 * heads * sequence.context_tokens + 52 * d, 88 * d, 58 * d + 24 * f)


def backward_working_bytes(
    architecture: "Architecture", sequence: Sequence, precision: str, residual: str = "fp32"
) -> int:
    """Return the peak bytes that a block's backward adds to its saved activations, for one sample.

    It is reached at the block's end: gradients of the residual and of the gated feed-forward with their product, or
    the gradients on both sides of GELU. A bf16 residual stream is cast to float32 there.
    """
    d, f = architecture.dim, architecture.ffn_dim
    gelu = (4 * d + 4 * f) if precision == "fp32" else (2 * d + 2 * f)
    return sequence.tokens * max((16 if residual == "bf16" else 12) * d, gelu)
