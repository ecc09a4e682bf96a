"""The student's forward pass, rebuilt from a WanTransformer3DModel for a fixed list of steps; knows no sampler.

Four fixed steps without guidance allow these optimisations, all of them the same math up to rounding:

- the modulation of every block at every step is a constant, computed at load in float32 and folded into LayerNorm;
- keys and values of the prompt are computed once per prompt, not once per step;
- queries, keys and values of a token are one matrix product, normalised and rotated together;
- rotary tables are computed once per shape;
- patches are embedded and projected by a matrix product instead of a convolution.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, N tokens, L prompt positions, D width,
G heads, E width of a head, S steps.
"""

import copy
import ctypes
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from codmd_serve.errors import ConfigError
from codmd_serve.wan.attention import NUM_PROMPT_POSITIONS, pad_logit_bias
from codmd_serve.wan.blank import blank_weights
from codmd_serve.wan.rows import PLAIN, RowOps, choose_rows, rms_norm, split_last

NUM_SHAPES_CACHED = 8

# (query_BNGE, key_BMGE, value_BMGE, logit bias that broadcasts to (B, G, N, M) or None) -> (B, N, G, E)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class PromptCache:
    """Cross-attention cache of a prompt: per block the keys and values (B, L, G, E), and the bias of their logits."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    logit_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Pending:
    """A deferred sum hidden + gate * update: (B, N, D), an update of that shape or None, (D,) or None."""

    hidden: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None


def sdpa(query: Tensor, key: Tensor, value: Tensor, logit_bias: Tensor | None) -> Tensor:
    """Attend with the kernel that torch chooses; (B, N, G, E) in and out."""
    out = functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=logit_bias
    )
    return out.transpose(1, 2)


class FewStepTransformer(nn.Module):
    """A text-to-video Wan transformer specialised to a fixed list of timesteps.

    Takes over the weights of `source` block by block and leaves it empty, so that at most one block exists twice.

    Args:
        source: any size, any floating dtype; its device is kept.
        timesteps: S numbers, as the student was trained to be fed.
        num_positions: prompt positions the network was trained to attend to.
        attend: the attention kernel.

    Attributes:
        rows: norms and what goes with them, fused where Triton runs.
        problem: one sentence why they are not fused on a CUDA device; else empty.
        prefers_compiled: whether layers were put in whose elementwise parts only a compiler fuses.

    Raises:
        ConfigError: an image-to-video network, or no timesteps.

    Source: diffusers, WanTransformer3DModel.forward.
    """

    # (S, D) each
    out_shift: Tensor
    out_scale: Tensor

    def __init__(
        self,
        source: WanTransformer3DModel,
        timesteps: Sequence[float],
        *,
        num_positions: int = NUM_PROMPT_POSITIONS,
        attend: Attend = sdpa,
    ) -> None:
        super().__init__()
        if source.config.image_dim is not None or source.config.added_kv_proj_dim is not None:
            raise ConfigError("expected a text-to-video Wan transformer, got one that also reads an image")
        if not timesteps:
            raise ConfigError("timesteps must hold at least one step, got none")
        self.config: Any = source.config
        self.num_positions, self.attend = num_positions, attend
        self.dtype: torch.dtype = source.proj_out.weight.dtype
        self._rope = source.rope
        self._tables: dict[tuple[int, int, int], Tensor] = {}
        with torch.no_grad():
            self._take(source, timesteps)
        self.rows, self.problem = choose_rows(self.device, self.dtype)
        self.prefers_compiled = False
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.proj_out.weight.device
        return device

    def _take(self, source: WanTransformer3DModel, timesteps: Sequence[float]) -> None:
        embedder = source.condition_embedder
        self.text_embedder = embedder.text_embedder
        temb_SD, modulation_S6D = _time_modulation(embedder, timesteps, source.device)
        patch = source.patch_embedding
        self.patch_weight = nn.Parameter(patch.weight.flatten(1))
        self.patch_bias = patch.bias
        self.proj_out = source.proj_out
        out_S2D = source.scale_shift_table.float() + temb_SD[:, None]
        self.register_buffer("out_shift", out_S2D[:, 0].contiguous(), persistent=False)
        self.register_buffer("out_scale", 1 + out_S2D[:, 1], persistent=False)
        self.blocks: Any = nn.ModuleList()
        for index in range(len(source.blocks)):
            self.blocks.append(_Block(source.blocks[index], modulation_S6D, self.attend))
            source.blocks[index] = nn.Identity()
            if self.device.type == "cpu":
                _return_freed_memory()

    def twin(self, attend: Attend) -> "FewStepTransformer":
        """Return a second network that shares all weights and has its own attention kernel.

        Layers put into one are not seen by the other. Prompt caches serve both.
        """
        shared = {id(tensor): tensor for tensor in itertools.chain(self.parameters(), self.buffers())}
        other = copy.deepcopy(self, shared)
        other.attend = attend
        for block in other.blocks:
            block.attend = attend
        return other

    @torch.no_grad()
    def encode_prompt(self, embeds_BLD: Tensor) -> PromptCache:
        """Compute the prompt cache that all steps share.

        Args:
            embeds_BLD: (B, L, text width), full-length or trimmed by `compact_prompt_embeds`, of any floating dtype.
        """
        num_kept = embeds_BLD.shape[1]
        text = self.text_embedder(embeds_BLD.to(self.device, self.dtype))
        bias = None
        if num_kept < self.num_positions:
            bias = pad_logit_bias(num_kept, self.num_positions, like=text)[None, None, None]
        return PromptCache(tuple(block.prompt_keys_values(text) for block in self.blocks), bias)

    @torch.no_grad()
    def forward(self, latents_BCFHW: Tensor, step_index: int, prompt: PromptCache, is_compiled: bool = False) -> Tensor:
        """Predict the flow of step `step_index`, (B, C, F, H, W) in the dtype of the weights.

        Args:
            latents_BCFHW: (B, C, F, H, W), any floating dtype; sides divisible by the patch.
            step_index: 0..S-1, into the timesteps given at construction.
            prompt: of the same B prompts.
            is_compiled: whether to take the blocks as `compile_blocks` made them. A shape that they have not seen
                compiles them again, so this is for shapes that were warmed.
        """
        tokens_BND = self._patches(latents_BCFHW)
        hidden = functional.linear(tokens_BND, self.patch_weight, self.patch_bias)
        table = self.rotary_table(latents_BCFHW.shape)
        scale, shift, eps = self.out_scale[step_index], self.out_shift[step_index], self.config.eps
        pending = Pending(hidden)
        for block, (key, value) in zip(self.blocks, prompt.keys_values, strict=True):
            modulation = block.modulation(step_index)
            if is_compiled:
                pending = Pending(block(pending.hidden, modulation, table, key, value, prompt.logit_bias))
            else:
                pending = block.run(self.rows, pending, modulation, table, key, value, prompt.logit_bias)
        _, normed = self.rows.add_norm(pending.hidden, pending.update, pending.gate, scale, shift, eps)
        return self._unpatch(self.proj_out(normed), latents_BCFHW.shape)

    def _patches(self, latents: Tensor) -> Tensor:
        batch, channels, frames, height, width = latents.shape
        t, h, w = self.config.patch_size
        split = latents.to(self.dtype).reshape(batch, channels, frames // t, t, height // h, h, width // w, w)
        return split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * t * h * w)

    def _unpatch(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        batch, _, frames, height, width = shape
        t, h, w = self.config.patch_size
        split = tokens.reshape(batch, frames // t, height // h, width // w, t, h, w, -1)
        return split.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, frames, height, width)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks at the next call with `is_compiled`; all blocks share the compiled code."""
        for block in self.blocks:
            block.compile(backend=backend)

    def rotary_table(self, shape: Sequence[int]) -> Tensor:
        """Return the rotary cosines and sines (1, N, 1, E/2, 2), float32, of latents (B, C, F, H, W)."""
        key = (shape[2], shape[3], shape[4])
        if key not in self._tables:
            if len(self._tables) >= NUM_SHAPES_CACHED:
                self._tables.pop(next(iter(self._tables)))
            cos, sin = self._rope(torch.empty(1, 1, *key, device=self.device))
            # Both tables hold every number twice, for the two channels of a pair.
            self._tables[key] = torch.stack([cos[..., 0::2], sin[..., 1::2]], -1).float().to(self.device)
        return self._tables[key]


class _Block(nn.Module):
    """One WanTransformerBlock with precomputed modulation for every step."""

    # (S, D) each, a scale with its 1 added
    shift: Tensor
    scale: Tensor
    gate: Tensor
    ffn_shift: Tensor
    ffn_scale: Tensor
    ffn_gate: Tensor

    def __init__(self, source: Any, modulation_S6D: Tensor, attend: Attend) -> None:
        super().__init__()
        self.attend, self.num_heads = attend, source.attn1.heads
        self.eps, self.qk_eps = source.norm1.eps, source.attn1.norm_q.eps
        self_attn, cross = source.attn1, source.attn2
        self.qkv = _fuse_linears(self_attn.to_q, self_attn.to_k, self_attn.to_v)
        self.qk_weight = nn.Parameter(torch.stack([self_attn.norm_q.weight, self_attn.norm_k.weight]).float())
        self.attn_out = self_attn.to_out[0]
        self.cross_q, self.cross_kv, self.cross_out = cross.to_q, _fuse_linears(cross.to_k, cross.to_v), cross.to_out[0]
        self.cross_q_weight = nn.Parameter(cross.norm_q.weight.float())
        self.cross_k_weight = nn.Parameter(cross.norm_k.weight.float())
        self.cross_norm = None if isinstance(source.norm2, nn.Identity) else source.norm2
        self.ffn_in, self.ffn_out = source.ffn.net[0].proj, source.ffn.net[2]
        table = source.scale_shift_table.float() + modulation_S6D
        for index, name in enumerate(("shift", "scale", "gate", "ffn_shift", "ffn_scale", "ffn_gate")):
            values_SD = table[:, index] + 1 if name.endswith("scale") else table[:, index]
            self.register_buffer(name, values_SD.contiguous(), persistent=False)

    def prompt_keys_values(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.cross_kv(text_BLD).chunk(2, dim=-1)
        return self._heads(rms_norm(key, self.cross_k_weight, self.qk_eps)), self._heads(value).contiguous()

    def modulation(self, step: int) -> tuple[Tensor, ...]:
        """Return the six vectors (D,) of a step, as tensors: constants would recompile the block for every step."""
        tables = (self.shift, self.scale, self.gate, self.ffn_shift, self.ffn_scale, self.ffn_gate)
        return tuple(table[step] for table in tables)

    def forward(
        self,
        hidden: Tensor,
        modulation: tuple[Tensor, ...],
        table: Tensor,
        key: Tensor,
        value: Tensor,
        logit_bias: Tensor | None,
    ) -> Tensor:
        """Run the whole block in plain torch, for inductor to fuse."""
        left = self.run(PLAIN, Pending(hidden), modulation, table, key, value, logit_bias)
        return PLAIN.add_norm(left.hidden, left.update, left.gate, None, None, self.eps)[0]

    def run(
        self,
        rows: RowOps,
        entered: Pending,
        modulation: tuple[Tensor, ...],
        table: Tensor,
        key: Tensor,
        value: Tensor,
        logit_bias: Tensor | None,
    ) -> Pending:
        """Run the block and defer the addition of its last update to the next norm."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        hidden, normed = rows.add_norm(entered.hidden, entered.update, entered.gate, scale, shift, self.eps)
        attended = self.attn_out(self._self_attention(rows, normed, table))
        affine, eps = self.cross_norm, self.eps
        weight, bias = (None, None) if affine is None else (affine.weight, affine.bias)
        hidden, normed = rows.add_norm(hidden, attended, gate, weight, bias, eps if affine is None else affine.eps)
        query = self.cross_q(normed)[:, :, None]
        query = rows.norm_rotate(query, self.cross_q_weight[None], self.qk_eps, self.num_heads, None)[:, :, 0]
        update = self.cross_out(self.attend(query, key, value, logit_bias).flatten(2))
        hidden, normed = rows.add_norm(hidden, update, None, ffn_scale, ffn_shift, self.eps)
        return Pending(hidden, self.ffn_out(rows.linear_gelu(self.ffn_in, normed)), ffn_gate)

    def _self_attention(self, rows: RowOps, normed: Tensor, table: Tensor) -> Tensor:
        qkv = split_last(self.qkv(normed), 3, -1)
        # Queries and keys together: normalised over all heads, then rotated in float32.
        turned = rows.norm_rotate(qkv[:, :, :2], self.qk_weight, self.qk_eps, self.num_heads, table)
        return self.attend(turned[:, :, 0], turned[:, :, 1], self._heads(qkv[:, :, 2]), None).flatten(2)

    def _heads(self, features: Tensor) -> Tensor:
        return split_last(features, self.num_heads, -1)


def _time_modulation(embedder: Any, timesteps: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the time embedding (S, D) and its six modulation vectors (S, 6, D), in float32 for any weights."""
    steps = torch.tensor(list(timesteps), dtype=torch.float32, device=device)
    frequencies = embedder.timesteps_proj(steps).float()
    first, second = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2
    temb_SD = _float_linear(functional.silu(_float_linear(frequencies, first)), second)
    modulation = _float_linear(functional.silu(temb_SD), embedder.time_proj)
    return temb_SD, split_last(modulation, 6, -1)


def _float_linear(features: Tensor, layer: nn.Linear) -> Tensor:
    return functional.linear(features, layer.weight.float(), layer.bias.float())


def _fuse_linears(*layers: nn.Linear) -> nn.Linear:
    """Return one linear layer that concatenates the outputs of several."""
    weight = torch.cat([layer.weight for layer in layers])
    with blank_weights():
        joined = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return joined


def _return_freed_memory() -> None:
    """Return the freed memory of a block to the system.

    Its separate projections lie between weights that stay, and the next block's fused ones do not fit into such holes:
    the allocator would keep the memory of all of them, a third of the network, until the process ends.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it
        trim(0)
