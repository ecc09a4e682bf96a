"""Cross-attention to a trimmed prompt that equals attention to all 512 padded positions of Wan.

Knows nothing of prompts, tokenizers or sampling: only of embeddings whose padding rows are zero.

Legend: B batch, L prompt positions as given, N positions kept, D text width.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from codmd_serve.errors import ConfigError

NUM_PROMPT_POSITIONS = 512


class CompactCrossAttnProcessor(WanAttnProcessor):  # type: ignore[misc]  # diffusers is untyped
    """Wan cross-attention in which the last key stands for every padding position that was trimmed away.

    Wan does not mask prompt padding: a prompt of n tokens is followed by 512 - n zero rows, and they all become the
    same key and value. m equal keys of logit z weigh m * exp(z) = exp(z + log m), so one of them with log m added
    to its logit gives the same output and the same gradients.
    """

    def __init__(self, num_positions: int = NUM_PROMPT_POSITIONS) -> None:
        super().__init__()
        self.num_positions = num_positions

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is None or attention_mask is not None:
            raise ConfigError("compact cross-attention needs prompt embeddings and no mask of the caller's own")
        bias_N = pad_logit_bias(encoder_hidden_states.shape[1], self.num_positions, like=hidden_states)
        mask = bias_N[None, None, None, :]
        out: torch.Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)
        return out


def pad_logit_bias(num_kept: int, num_positions: int, like: torch.Tensor) -> torch.Tensor:
    """Return the (N,) additive logit bias, 0 but for the last key, which gets log(number of positions it stands for).

    Args:
        num_kept: N, positions in the trimmed embeddings, 1 <= N <= num_positions.
        num_positions: positions the network was trained to attend to (512 for Wan).
        like: gives dtype and device.

    With nothing trimmed (N = num_positions) the bias is zero, so full-length embeddings need no special case.
    """
    num_represented = num_positions - num_kept + 1
    # Tensor log, not math.log: under torch.compile with dynamic shapes num_kept is symbolic.
    # In float32 or wider: in bfloat16 the count itself would be rounded before its log is taken.
    dtype = torch.promote_types(like.dtype, torch.float32)
    last = torch.full((1,), num_represented, dtype=dtype, device=like.device).log()
    return torch.cat([last.new_zeros(num_kept - 1), last]).to(like.dtype)


def use_compact_cross_attention(
    transformer: WanTransformer3DModel, num_positions: int = NUM_PROMPT_POSITIONS
) -> WanTransformer3DModel:
    """Make every cross-attention of `transformer` accept the output of `compact_prompt_embeds`; weights are unchanged.

    Args:
        transformer: changed in place and returned; text to video only.
        num_positions: positions the network was trained to attend to.

    Raises:
        ConfigError: the network also attends to image tokens, whose number the text positions cannot be told from.

    After this call the last row of any embeddings shorter than `num_positions` is taken as padding.
    """
    for index, block in enumerate(transformer.blocks):
        if block.attn2.add_k_proj is not None:
            raise ConfigError(f"expected a text-to-video Wan transformer, got image keys in block {index}")
        block.attn2.set_processor(CompactCrossAttnProcessor(num_positions))
    return transformer


def prompt_lengths(embeds_BLD: torch.Tensor) -> list[int]:
    """Return for each prompt the number of positions up to its last row that is not all zero (0 for none)."""
    positions_L = torch.arange(1, embeds_BLD.shape[1] + 1, device=embeds_BLD.device)
    used_BL = (embeds_BLD != 0).any(dim=-1)
    lengths: list[int] = (used_BL * positions_L).amax(dim=1).tolist()
    return lengths


def pad_prompt_embeds(embeds_BLD: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Append zero rows up to the least of `sizes` that is not below L; as given when there is none.

    Args:
        embeds_BLD: output of `compact_prompt_embeds`; attention to it stays what it was, up to the order of sums.
        sizes: lengths that a network was compiled or captured for.
    """
    num_given = embeds_BLD.shape[1]
    size = min((size for size in sizes if size >= num_given), default=num_given)
    return torch.nn.functional.pad(embeds_BLD, (0, 0, 0, size - num_given))


def compact_prompt_embeds(
    embeds_BLD: torch.Tensor,
    lengths: Sequence[int] | torch.Tensor | None = None,
    *,
    num_positions: int = NUM_PROMPT_POSITIONS,
    multiple: int = 8,
) -> torch.Tensor:
    """Trim zero padding, keeping at least one zero row at the end to stand for all that was trimmed.

    Args:
        embeds_BLD: (B, L, D), any float dtype, rows at and past each prompt's length zero; L <= num_positions.
        lengths: real positions of each prompt; read off the embeddings when None (this synchronises a GPU).
        num_positions: positions the network was trained to attend to.
        multiple: N is rounded up to this, so that few distinct shapes reach a compiled or captured network.

    Returns:
        (B, N, D) with N = min(round_up(max(lengths) + 1, multiple), num_positions).

    Raises:
        ConfigError: a length is negative, above L, or L is above num_positions.
    """
    counts = prompt_lengths(embeds_BLD) if lengths is None else [int(n) for n in lengths]
    num_given = embeds_BLD.shape[1]
    longest = max(counts, default=0)
    if min(counts, default=0) < 0 or longest > num_given or num_given > num_positions:
        raise ConfigError(
            f"expected prompt lengths in 0..{num_given} and at most {num_positions} positions, "
            f"got lengths up to {longest} and {num_given} positions"
        )
    num_kept = min(math.ceil((longest + 1) / multiple) * multiple, num_positions)
    if num_kept <= num_given:
        return embeds_BLD[:, :num_kept]
    return torch.nn.functional.pad(embeds_BLD, (0, 0, 0, num_kept - num_given))
