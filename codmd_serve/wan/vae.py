"""Latents to pixels, chunk by chunk, by a decoder rebuilt from AutoencoderKLWan; knows nothing of files.

Both layouts of diffusers: Wan 2.1's, and the residual one with patches of Wan 2.2. What differs from its decoder:

- `same math`: 3D convolutions run on channels_last_3d and, on a CPU, in oneDNN at any size. torch takes its slow kernel
  for a batch of one there, which is 4 to 12 times slower at the sizes of the embedded VAE.
- `same math`: RMSNorm multiplies by one weight, gamma * sqrt(C), and runs with SiLU in place.
- `exact`: several latent frames per call; an activation is written straight behind the two frames that its causal
  convolution keeps, in place of a copy, a concatenation and a padding; no float32 round trip in the upsampling.

Legend: B batch, C channels, F latent frames, T frames, H and W rows and columns.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FIRST_CHUNK = 5  # latent frames; a chunk costs launches and history, a long one memory
CHUNK = 4
HISTORY = 2  # frames that a causal convolution of 3 looks back
NORM_EPS = 1e-12


def latent_shape(vae: Any, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
    """Latent (C, F, H, W) of a video of height x width pixels and num_frames = k * temporal factor + 1 frames."""
    temporal, spatial = vae_scales(vae.config)
    return vae.config.z_dim, (num_frames - 1) // temporal + 1, height // spatial, width // spatial


def vae_scales(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the frames and the pixels per side that one latent of a VAE stands for, from its config."""
    # Published Wan 2.1 folders leave these out; they are the defaults of the class.
    return config.get("scale_factor_temporal", 4), config.get("scale_factor_spatial", 8)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] of any floating dtype to rounded uint8 of the same shape."""
    return pixels.float().clamp(-1.0, 1.0).add_(1.0).mul_(127.5).round_().to(torch.uint8)


class StreamingDecoder(nn.Module):
    """The decoder of an AutoencoderKLWan, shared weights in channels_last_3d.

    Args:
        vae: either layout. Its weights are used where they are, its convolutions' are brought into channels_last_3d in
            place, which changes no value. Its tiling and slicing switches are not consulted.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        decoder = vae.decoder
        self.patch_size: int = vae.config.patch_size or 1
        self.post_quant, self.conv_in = _Conv(vae.post_quant_conv), _Conv(decoder.conv_in)
        first, second = decoder.mid_block.resnets
        self.mid = nn.ModuleList([_Residual(first), _Attention(decoder.mid_block.attentions[0]), _Residual(second)])
        self.up = nn.ModuleList(_UpBlock(block) for block in decoder.up_blocks)
        self.norm_out, self.conv_out = _NormSilu(decoder.norm_out), _Conv(decoder.conv_out)
        for name in ("latents_mean", "latents_std"):
            values = torch.tensor(vae.config[name], dtype=vae.dtype, device=vae.device)
            self.register_buffer(name, values.reshape(1, -1, 1, 1, 1), persistent=False)

    def frames(self, latents_BCFHW: Tensor) -> Iterator[Tensor]:
        """Decode normalised latents to uint8 frames; memory does not grow with their number.

        Args:
            latents_BCFHW: (B, C, F, H, W) as the transformer sees them, (z - latents_mean) / latents_std.

        Yields:
            (B, T, height, width, 3) uint8 on the VAE's device, T the frames of up to 5 latent frames, then of up to 4.
            Concatenated they are the clamped and rounded output of `vae.decode`, up to the rounding of its sums.

        Source: diffusers, AutoencoderKLWan._decode. What a convolution remembers belongs to this call, so an abandoned
        decode leaves nothing behind.
        """
        history: History = {}
        num_frames, start = latents_BCFHW.shape[2], 0
        while start < num_frames:
            size = CHUNK if start else FIRST_CHUNK
            # Not around the yield: the caller's code would run with gradients switched off.
            with torch.no_grad():
                chunk = self._decode(latents_BCFHW[:, :, start : start + size], history, is_first=start == 0)
            yield chunk
            start += size

    def _decode(self, latents: Tensor, history: "History", is_first: bool) -> Tensor:
        mean, std = self.latents_mean, self.latents_std
        raw = (latents.to(mean.device, mean.dtype) * std + mean).contiguous(memory_format=torch.channels_last_3d)
        hidden = self.conv_in(self.post_quant(raw, history), history)
        for block in self.mid:
            hidden = block(hidden, history)
        for block in self.up:
            hidden = block(hidden, history, is_first)
        activated = self.conv_out.buffer(hidden, history)
        self.norm_out(hidden, out=activated[:, :, HISTORY:])
        pixels = to_uint8(self.conv_out.run(activated, history))
        batch, _channels, frames, height, width = pixels.shape
        patch = self.patch_size
        split = pixels.permute(0, 2, 3, 4, 1).reshape(batch, frames, height, width, -1, patch, patch)
        # Of the two inner axes the last one is the row, as diffusers' unpatchify has it.
        return split.permute(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, height * patch, width * patch, -1)


# Last frames of the input of each causal convolution
History = dict["_Conv", Tensor]


class _Conv(nn.Module):
    """A WanCausalConv3d that pads space itself and remembers the last two frames of its input."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        source.weight.data = source.weight.data.contiguous(memory_format=torch.channels_last_3d)
        self.weight, self.bias = source.weight, source.bias
        self.space = [0, source._padding[2], source._padding[0]]
        self.is_causal = source.kernel_size[0] > 1

    def buffer(self, like: Tensor, history: History) -> Tensor:
        """Room for the remembered frames, already filled in, and for an input of the shape of `like` after them."""
        batch, _channels, frames, height, width = like.shape
        shape = (batch, self.weight.shape[1], frames + HISTORY, height, width)
        room = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)
        past = history.get(self)
        if past is None:
            room[:, :, :HISTORY] = 0.0
        else:
            room[:, :, :HISTORY] = past
        return room

    def run(self, room: Tensor, history: History) -> Tensor:
        """Convolve a filled buffer and remember its last frames."""
        history[self] = room[:, :, -HISTORY:].clone(memory_format=torch.channels_last_3d)
        return convolve(room, self.weight, self.bias, self.space)

    def forward(self, hidden: Tensor, history: History) -> Tensor:
        if not self.is_causal:
            return convolve(hidden, self.weight, self.bias, self.space)
        room = self.buffer(hidden, history)
        room[:, :, HISTORY:] = hidden
        return self.run(room, history)


class _NormSilu(nn.Module):
    """WanRMS_norm over channels, then SiLU, written to `out`."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        weight = (source.gamma.float() * source.scale).reshape(1, -1, 1, 1, 1)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: Tensor, out: Tensor) -> None:
        if hidden.dtype != torch.float32:
            out.copy_(functional.silu(_rms_norm(hidden.float(), self.weight, dim=1)))
            return
        length = torch.linalg.vector_norm(hidden, dim=1, keepdim=True).clamp_min_(NORM_EPS)
        torch.div(hidden, length, out=out)
        functional.silu(out.mul_(self.weight), inplace=True)


class _Residual(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = _NormSilu(source.norm1), _Conv(source.conv1)
        self.norm2, self.conv2 = _NormSilu(source.norm2), _Conv(source.conv2)
        self.shortcut = None if isinstance(source.conv_shortcut, nn.Identity) else _Conv(source.conv_shortcut)

    def forward(self, hidden: Tensor, history: History) -> Tensor:
        passed = hidden if self.shortcut is None else self.shortcut(hidden, history)
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            room = conv.buffer(hidden, history)
            norm(hidden, out=room[:, :, HISTORY:])
            hidden = conv.run(room, history)
        return hidden.add_(passed)


class _Attention(nn.Module):
    """Self-attention within each frame, one head; matrix products on rows of channels."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter((source.norm.gamma.float() * source.norm.scale).flatten(), requires_grad=False)
        self.qkv, self.proj = source.to_qkv, source.proj

    def forward(self, hidden: Tensor, _history: History) -> Tensor:
        batch, channels, frames, height, width = hidden.shape
        rows = hidden.permute(0, 2, 3, 4, 1).reshape(batch * frames, height * width, channels)
        normed = _rms_norm(rows.float(), self.norm_weight, dim=-1).to(rows.dtype)
        query, key, value = _pointwise(normed, self.qkv)[:, None].chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(query, key, value)[:, 0]
        rows = rows + _pointwise(attended, self.proj)
        return rows.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


class _UpBlock(nn.Module):
    """Residual blocks, then doubling of space and, where the source has a time convolution, of time."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(block) for block in source.resnets)
        resample = getattr(source, "upsampler", None)
        if resample is None and getattr(source, "upsamplers", None) is not None:
            resample = source.upsamplers[0]
        self.upsample = None if resample is None else _Upsample(resample)
        shortcut = getattr(source, "avg_shortcut", None)
        self.shortcut = None if shortcut is None else _Shortcut(shortcut)

    def forward(self, hidden: Tensor, history: History, is_first: bool) -> Tensor:
        entered = hidden
        for block in self.resnets:
            hidden = block(hidden, history)
        if self.upsample is not None:
            hidden = self.upsample(hidden, history, is_first)
        return hidden if self.shortcut is None else hidden.add_(self.shortcut(entered, is_first))


class _Upsample(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.time = _Conv(source.time_conv) if source.mode == "upsample3d" else None
        conv = source.resample[1]
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
        # A 2D convolution is a 3D one whose kernel is one frame long.
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, hidden: Tensor, history: History, is_first: bool) -> Tensor:
        if self.time is not None:
            # The first frame of a video stands for itself alone, and no later one looks back at it.
            rest = self._double_time(hidden[:, :, 1:] if is_first else hidden, history)
            hidden = torch.cat([hidden[:, :, :1], rest], dim=2) if is_first else rest
        batch, channels, frames, height, width = hidden.shape
        rows = hidden.permute(0, 2, 3, 4, 1)[:, :, :, None, :, None]
        wide = rows.expand(batch, frames, height, 2, width, 2, channels).reshape(
            batch, frames, 2 * height, 2 * width, -1
        )
        return convolve(wide.permute(0, 4, 1, 2, 3), self.weight[:, :, None], self.bias, [0, 1, 1])

    def _double_time(self, hidden: Tensor, history: History) -> Tensor:
        batch, channels, frames, height, width = hidden.shape
        if not frames or self.time is None:
            return hidden
        rows: Tensor = self.time(hidden, history).permute(0, 2, 3, 4, 1)
        pairs = rows.reshape(batch, frames, height, width, 2, channels).permute(0, 1, 4, 2, 3, 5)
        return pairs.reshape(batch, 2 * frames, height, width, channels).permute(0, 4, 1, 2, 3)


class _Shortcut(nn.Module):
    """DupUp3D: every output channel, time and place takes one input channel."""

    channels: Tensor

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.factors = (source.factor_t, source.factor_s)
        channel = torch.arange(source.out_channels)[None] * source.factor + torch.arange(source.factor)[:, None]
        self.is_plain = source.repeats == source.factor
        self.register_buffer("channels", (channel // source.repeats).flatten(), persistent=False)

    def forward(self, hidden: Tensor, is_first: bool) -> Tensor:
        (factor_t, factor_s), (batch, _, frames, height, width) = self.factors, hidden.shape
        rows = hidden.permute(0, 2, 3, 4, 1)
        if self.is_plain:  # each channel goes to its own place everywhere
            shape = (batch, frames, factor_t, height, factor_s, width, factor_s, rows.shape[-1])
            wide = rows[:, :, None, :, None, :, None].expand(shape)
        else:
            taken = rows[..., self.channels.to(rows.device)]
            wide = taken.reshape(*taken.shape[:-1], factor_t, factor_s, factor_s, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        doubled = wide.reshape(batch, frames * factor_t, height * factor_s, width * factor_s, -1)
        return doubled.permute(0, 4, 1, 2, 3)[:, :, factor_t - 1 if is_first else 0 :]


def convolve(hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    """Dense 3D convolution of stride 1; on a CPU by oneDNN, whatever the size."""
    if hidden.device.type == "cpu" and hidden.dtype in (torch.float32, torch.bfloat16) and _HAS_ONEDNN:
        out: Tensor = torch.mkldnn_convolution(hidden, weight, bias, padding, [1, 1, 1], [1, 1, 1], 1)
        return out
    return functional.conv3d(hidden, weight, bias, padding=padding)


_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _rms_norm(hidden: Tensor, weight: Tensor, dim: int) -> Tensor:
    length = torch.linalg.vector_norm(hidden, dim=dim, keepdim=True).clamp_min_(NORM_EPS)
    return torch.div(hidden, length).mul_(weight)


def _pointwise(rows: Tensor, conv: nn.Conv2d) -> Tensor:
    return functional.linear(rows, conv.weight[:, :, 0, 0], conv.bias)
