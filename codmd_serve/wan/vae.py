"""Latents to pixels, chunk by chunk, by a decoder rebuilt from AutoencoderKLWan; knows nothing of files.

Both layouts of diffusers: Wan 2.1's, and the residual one with patches of Wan 2.2. What differs from its decoder:

- `same math`: 3D convolutions run on channels_last_3d and, on a CPU, in oneDNN at any size. torch takes its slow kernel
  for a batch of one there, which is 4 to 12 times slower at the sizes of the embedded VAE.
- `same math`: RMSNorm multiplies by one weight, gamma * sqrt(C). On CUDA one Triton kernel adds the bias of the
  convolution before it and the residual, norms, applies SiLU and writes where the next convolution reads (`fused`).
- `same math`: nearest upsampling and its convolution are one transposed convolution: 16 products instead of 36.
- `same math`: float16 storage with float32 sums and norms, where the activations fit (`set_dtype`).
- bfloat16 on a CPU keeps the last convolution in float32: near white its steps are half a level, which bands.
- `exact`: several latent frames per call; an activation is written straight behind the two frames that its causal
  convolution keeps, in place of a copy, a concatenation and a padding.
- `exact`: on CUDA 96 output channels are padded to 128 and the 3 of the last convolution to 8: cuDNN has no fast kernel
  for the others. What is padded is never read.

Legend: B batch, C channels, F latent frames, T frames, H and W rows and columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from codmd_serve.wan.fused import NORM_EPS, AddNormSilu, Sum, choose_add_norm_silu
from codmd_serve.wan.history import HISTORY, History

FIRST_CHUNK = 5  # latent frames; a chunk costs launches and history, a long one memory
CHUNK = 4
# Output channels that cuDNN has slower kernels for, and how many it is given instead. Measured on an H200 with cuDNN
# 9.19 in float16, 16 frames of 480 x 832: 96 outputs 11.4 ms by its heuristics, 7.8 the best it has, 128 outputs 7.2;
# 3 outputs 4.3 ms, 8 outputs 4.0. The transposed convolution after which 96 channels are left is best at 96.
CUDNN_OUTPUTS = {96: 128, 3: 8, 12: 16}
MAX_ELEMENTS = 2**31 - 1  # of one tensor: kernels of cuDNN and ATen index with 32 bits


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


class ChunkReplays(Protocol):
    """Recorded chunks of a decoder."""

    def history(self, shape: Sequence[int]) -> History | None:
        """Return the history that chunks of latents of this shape were recorded with, emptied; None for no such."""

    def replay(self, latents_BCFHW: Tensor, history: History, is_first: bool) -> Tensor | None:
        """Return the uint8 frames of a chunk; None when none like it was recorded."""


class StreamingDecoder(nn.Module):
    """The decoder of an AutoencoderKLWan, shared weights in channels_last_3d.

    Args:
        vae: either layout. Its weights are used where they are, its convolutions' are brought into channels_last_3d in
            place, which changes no value. Its tiling and slicing switches are not consulted.

    Attributes:
        dtype: of weights and activations; `set_dtype` changes it.
        problem: why norms are not fused on a CUDA device, one sentence; empty when they are, and on a CPU.
        max_chunk: latent frames per call, fewer where a tensor would pass 2^31 elements.
        replays: recorded chunks; None when every chunk runs eagerly. One decode at a time may use them.
    """

    latents_mean: Tensor
    latents_std: Tensor
    overflow: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        decoder = vae.decoder
        self.dtype: torch.dtype = vae.dtype
        self.patch_size: int = vae.config.patch_size or 1
        self.max_chunk = CHUNK
        self.post_quant, self.conv_in = _Conv(vae.post_quant_conv), _Conv(decoder.conv_in)
        first, second = decoder.mid_block.resnets
        self.mid = nn.ModuleList([_Residual(first), _Attention(decoder.mid_block.attentions[0]), _Residual(second)])
        self.up = nn.ModuleList(_UpBlock(block) for block in decoder.up_blocks)
        self.norm_out, self.conv_out = _norm_weight(decoder.norm_out), _Conv(decoder.conv_out)
        for name in ("latents_mean", "latents_std"):
            values = torch.tensor(vae.config[name], dtype=torch.float32, device=vae.device)
            self.register_buffer(name, values.reshape(1, -1, 1, 1, 1), persistent=False)
        # Written in place, as the history is: a recorded chunk knows its address.
        with torch.inference_mode(False):  # an inference tensor could not be written in place outside of that mode
            self.register_buffer("overflow", torch.zeros((), dtype=torch.bool, device=vae.device), persistent=False)
        for shortcut in (module for module in self.modules() if isinstance(module, _Shortcut)):
            shortcut.to(vae.device)
        self.run_norm, self.problem = choose_add_norm_silu(vae.device, self.dtype)
        self.replays: ChunkReplays | None = None

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Convert the weights of convolutions and attention; norms and biases that are added apart stay float32.

        Recorded chunks read weights of the dtype that was: they are dropped.
        """
        self.replays = None
        for module in self.modules():
            keeps = module is self.conv_out and dtype == torch.bfloat16 and self.latents_mean.device.type == "cpu"
            if isinstance(module, _Conv | _Upsample | nn.Conv2d) and not keeps:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, converted(parameter, dtype))
        self.dtype = dtype
        self.run_norm, self.problem = choose_add_norm_silu(self.latents_mean.device, dtype)

    def frames(self, latents_BCFHW: Tensor) -> Iterator[Tensor]:
        """Decode normalised latents to uint8 frames; memory does not grow with their number.

        Args:
            latents_BCFHW: (B, C, F, H, W) as the transformer sees them, (z - latents_mean) / latents_std.

        Yields:
            (B, T, height, width, 3) uint8 on the VAE's device, T the frames of up to 5 latent frames, then of up to 4.
            Concatenated they are the clamped and rounded output of `vae.decode`, up to the rounding of its sums.

        Source: diffusers, AutoencoderKLWan._decode. What a convolution remembers is emptied here, so an abandoned
        decode leaves nothing behind.
        """
        replays = self.replays
        history = None if replays is None else replays.history(latents_BCFHW.shape)
        if history is None:
            history, replays = History(), None
        with torch.no_grad():
            self.overflow.zero_()
        start = 0
        for size in self.chunk_sizes(latents_BCFHW.shape):
            part, is_first = latents_BCFHW[:, :, start : start + size], start == 0
            # Not around the yield: the caller's code would run with gradients switched off.
            with torch.no_grad():
                chunk = None if replays is None else replays.replay(part, history, is_first)
                if chunk is None:
                    chunk = self.decode_chunk(part, history, is_first)
            yield chunk
            start += size

    def chunk_sizes(self, shape: Sequence[int]) -> Iterator[int]:
        """Yield the latent frames of each chunk of latents (B, C, F, H, W)."""
        later = self.chunk_size(shape)
        size, left = min(FIRST_CHUNK, later + 1), shape[2]
        while left > 0:
            yield min(size, left)
            left -= size
            size = later

    def chunk_size(self, shape: Sequence[int]) -> int:
        """Latent frames per call, so that no tensor of latents (B, C, F, H, W) passes 2^31 elements; at least one."""
        batch, _, _, height, width = shape
        size = min(self.max_chunk, CHUNK)
        while size > 1 and any(
            batch * height * width * channels * space**2 * (size * time + HISTORY) > MAX_ELEMENTS
            for channels, space, time in self._scales()
        ):
            size -= 1
        return size

    def _scales(self) -> Iterator[tuple[int, int, int]]:
        """Channels of the widest activations, with how much larger than a latent they are in space and in time."""
        space = time = 1
        blocks: list[Any] = list(self.up)
        for block in blocks:
            widths = [max(conv.weight.shape[:2]) for conv in block.resnets.modules() if isinstance(conv, _Conv)]
            yield max(widths), space, time
            if block.upsample is not None:
                space *= 2
                time *= 2 if block.upsample.time is not None else 1
                yield block.upsample.weight.shape[1], space, time

    def has_overflowed(self) -> bool:
        """Whether a frame of the last decode was not finite; waits for the device. Only float16 is looked at."""
        return self.dtype == torch.float16 and bool(self.overflow)

    def largest_activation(self, latents_BCFHW: Tensor) -> tuple[float, Tensor]:
        """Largest number that a convolution of the first chunk gives, alone or with the residual; and its frames."""
        largest: list[Tensor] = []
        run = self.run_norm

        def watched(given: Sum, weight: Tensor | None, out: Tensor | None, keep_total: bool) -> Tensor | None:
            largest.append(given.value.abs().amax().float())
            total = run(given, weight, out, True)
            assert total is not None
            largest.append(total.abs().amax().float())
            return total if keep_total else None

        self.run_norm = watched
        try:
            frames_BTHWC = next(self.frames(latents_BCFHW))
        finally:
            self.run_norm = run
        return float(torch.stack(largest).max()), frames_BTHWC

    def decode_chunk(self, latents: Tensor, history: History, is_first: bool) -> Tensor:
        """Decode one chunk of `frames`, which has to be the next one of `history`; neither syncs nor keeps state."""
        raw = latents.to(self.latents_mean.device, torch.float32) * self.latents_std + self.latents_mean
        raw = raw.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        run = self.run_norm
        hidden = self.conv_in.summed(self.post_quant(raw, history), history)
        for block in self.mid:
            hidden = block(hidden, history, run)
        for block in self.up:
            hidden = block(hidden, history, is_first, run)
        activated = self.conv_out.buffer(hidden.value, history)
        run(hidden, self.norm_out, activated[:, :, HISTORY:], False)
        pixels = self.conv_out.run(activated, history)
        if self.dtype == torch.float16:
            # Infinity becomes NaN in the next norm and reaches the pixels; asked for once per video, not per chunk.
            self.overflow.logical_or_(~pixels.isfinite().all())
        frames_BTHWC = to_uint8(pixels.permute(0, 2, 3, 4, 1))
        batch, frames, height, width, _channels = frames_BTHWC.shape
        patch = self.patch_size
        split = frames_BTHWC.reshape(batch, frames, height, width, -1, patch, patch)
        # Of the two inner axes the last one is the row, as diffusers' unpatchify has it.
        return split.permute(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, height * patch, width * patch, -1)


class _Conv(nn.Module):
    """A WanCausalConv3d that pads space itself and remembers the last two frames of its input."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        source.weight.data = source.weight.data.contiguous(memory_format=torch.channels_last_3d)
        self.weight, self.bias, self.num_out = padded_outputs(source.weight, source.bias)
        self.space = [0, source._padding[2], source._padding[0]]
        self.is_causal = source.kernel_size[0] > 1
        self.float_bias = source.bias.detach().float()

    def buffer(self, like: Tensor, history: History) -> Tensor:
        """Room for the remembered frames, already filled in, and for an input of the shape of `like` after them."""
        batch, _channels, frames, height, width = like.shape
        shape = (batch, self.weight.shape[1], frames + HISTORY, height, width)
        # As the weight: the last convolution may be wider than what comes before it.
        room = torch.empty(shape, dtype=self.weight.dtype, device=like.device, memory_format=torch.channels_last_3d)
        past = history.get(self)
        if past is None:
            room[:, :, :HISTORY] = 0.0
        else:
            room[:, :, :HISTORY] = past
        return room

    def run(self, room: Tensor, history: History) -> Tensor:
        """Convolve a filled buffer and remember its last frames."""
        history.keep(self, room)
        return convolve(room, self.weight, self.bias, self.space)[:, : self.num_out]

    def run_summed(self, room: Tensor, history: History) -> Sum:
        """`run`, whose bias is left to the next pass where the convolution would make a pass of its own for it."""
        if not adds_bias_apart(room):
            return Sum(self.run(room, history))
        history.keep(self, room)
        return Sum(convolve(room, self.weight, None, self.space)[:, : self.num_out], self.float_bias)

    def summed(self, hidden: Tensor, history: History) -> Sum:
        """`forward` as a sum."""
        return self.run_summed(self._filled(hidden, history), history)

    def _filled(self, hidden: Tensor, history: History) -> Tensor:
        room = self.buffer(hidden, history)
        room[:, :, HISTORY:] = hidden
        return room

    def forward(self, hidden: Tensor, history: History) -> Tensor:
        if not self.is_causal:
            return convolve(hidden, self.weight, self.bias, self.space)[:, : self.num_out]
        return self.run(self._filled(hidden, history), history)


def converted(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """The parameter itself with its values in `dtype`; one that was made in inference mode is replaced.

    Whoever shares the parameter sees the change. A parameter of inference mode cannot take over other values: it would
    be half of each kind, and a convolution refuses it.
    """
    with torch.inference_mode(False), torch.no_grad():
        if not parameter.is_inference():
            parameter.data = parameter.data.to(dtype)
            return parameter
        values = torch.empty_strided(parameter.shape, parameter.stride(), dtype=dtype, device=parameter.device)
    values.copy_(parameter)
    with torch.inference_mode(False):
        return nn.Parameter(values, requires_grad=False)


def adds_bias_apart(hidden: Tensor) -> bool:
    """Whether a convolution of `hidden` adds its bias in a pass of its own: cuDNN's does, oneDNN's does not."""
    return hidden.device.type == "cuda"


def pads_outputs(weight: Tensor) -> bool:
    """Return whether a convolution is given more outputs than are read: cuDNN has faster kernels for them."""
    return weight.device.type == "cuda"


def padded_outputs(weight: nn.Parameter, bias: nn.Parameter) -> tuple[nn.Parameter, nn.Parameter, int]:
    """Weight (O, I, ...) and bias (O,) with zero rows up to a number that cuDNN has fast kernels for, and O."""
    num_out = weight.shape[0]
    missing = CUDNN_OUTPUTS.get(num_out, num_out) - num_out
    if not pads_outputs(weight) or not missing:
        return weight, bias, num_out
    wide = functional.pad(weight.detach(), (*[0, 0] * (weight.dim() - 1), 0, missing))
    layout = torch.channels_last_3d if weight.dim() == 5 else torch.channels_last
    wide_bias = functional.pad(bias.detach(), (0, missing))
    parameters = [nn.Parameter(t, requires_grad=False) for t in (wide.contiguous(memory_format=layout), wide_bias)]
    return parameters[0], parameters[1], num_out


def _norm_weight(source: Any) -> nn.Parameter:
    """gamma * sqrt(C) of a WanRMS_norm, (C,) float32."""
    return nn.Parameter((source.gamma.detach().float() * source.scale).flatten(), requires_grad=False)


class _Residual(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm_weight(source.norm1), _Conv(source.conv1)
        self.norm2, self.conv2 = _norm_weight(source.norm2), _Conv(source.conv2)
        self.shortcut = None if isinstance(source.conv_shortcut, nn.Identity) else _Conv(source.conv_shortcut)

    def forward(self, entered: Sum, history: History, run: AddNormSilu) -> Sum:
        room = self.conv1.buffer(entered.value, history)
        hidden = run(entered, self.norm1, room[:, :, HISTORY:], True)
        assert hidden is not None
        passed = hidden if self.shortcut is None else self.shortcut(hidden, history)
        between = self.conv1.run_summed(room, history)
        room = self.conv2.buffer(between.value, history)
        run(between, self.norm2, room[:, :, HISTORY:], False)
        added = self.conv2.run_summed(room, history)
        return Sum(added.value, added.bias, passed)


class _Attention(nn.Module):
    """Self-attention within each frame, one head; matrix products on rows of channels."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter((source.norm.gamma.float() * source.norm.scale).flatten(), requires_grad=False)
        self.qkv, self.proj = source.to_qkv, source.proj

    def forward(self, entered: Sum, _history: History, run: AddNormSilu) -> Sum:
        hidden = run(entered, None, None, True)
        assert hidden is not None
        batch, channels, frames, height, width = hidden.shape
        rows = hidden.permute(0, 2, 3, 4, 1).reshape(batch * frames, height * width, channels)
        normed = _rms_norm(rows.float(), self.norm_weight, dim=-1).to(rows.dtype)
        query, key, value = _pointwise(normed, self.qkv)[:, None].chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(query, key, value)[:, 0]
        rows = rows + _pointwise(attended, self.proj)
        return Sum(rows.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3))


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

    def forward(self, entered: Sum, history: History, is_first: bool, run: AddNormSilu) -> Sum:
        passed, hidden = None, entered
        if self.shortcut is not None:
            total = run(entered, None, None, True)
            assert total is not None
            hidden, passed = Sum(total), self.shortcut(total, is_first)
        for block in self.resnets:
            hidden = block(hidden, history, run)
        if self.upsample is not None:
            total = run(hidden, None, None, True)
            assert total is not None
            hidden = self.upsample(total, history, is_first)
        if passed is None:
            return hidden
        return Sum(hidden.value, hidden.bias, passed if hidden.residual is None else passed.add_(hidden.residual))


class _Upsample(nn.Module):
    """Twice the frames where the source has a time convolution, then twice the rows and columns."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.time = _Conv(source.time_conv) if source.mode == "upsample3d" else None
        conv = source.resample[1]
        folded = upsampling_weight(conv.weight.detach()).contiguous(memory_format=torch.channels_last)
        self.weight, self.bias = nn.Parameter(folded, requires_grad=False), conv.bias
        self.float_bias = conv.bias.detach().float()

    def forward(self, hidden: Tensor, history: History, is_first: bool) -> Sum:
        if self.time is not None:
            # The first frame of a video stands for itself alone, and no later one looks back at it.
            rest = self._double_time(hidden[:, :, 1:] if is_first else hidden, history)
            hidden = torch.cat([hidden[:, :, :1], rest], dim=2) if is_first else rest
        batch, channels, frames, height, width = hidden.shape
        flat = hidden.transpose(1, 2).reshape(batch * frames, channels, height, width)
        is_apart = adds_bias_apart(hidden)
        bias = None if is_apart else self.bias
        wide = functional.conv_transpose2d(flat, self.weight, bias, stride=2, padding=1)
        wide = wide.reshape(batch, frames, -1, 2 * height, 2 * width).transpose(1, 2)
        return Sum(wide, self.float_bias if is_apart else None)

    def _double_time(self, hidden: Tensor, history: History) -> Tensor:
        batch, channels, frames, height, width = hidden.shape
        if not frames or self.time is None:
            return hidden
        rows: Tensor = self.time(hidden, history).permute(0, 2, 3, 4, 1)
        pairs = rows.reshape(batch, frames, height, width, 2, channels).permute(0, 1, 4, 2, 3, 5)
        return pairs.reshape(batch, 2 * frames, height, width, channels).permute(0, 4, 1, 2, 3)


def upsampling_weight(weight: Tensor) -> Tensor:
    """(I, O, 4, 4) of the transposed convolution of stride 2 that a (O, I, 3, 3) one after nearest upsampling is.

    Output o sees input i through the taps k of the convolution whose row o + k - 1 was copied from i. With
    d = o - 2 i + 1 these are 2 - d and 3 - d.
    """
    taps = weight.new_zeros(4, 3, dtype=torch.float32)
    for d in range(4):
        for k in (2 - d, 3 - d):
            if 0 <= k < 3:
                taps[d, k] = 1.0
    return torch.einsum("dk,el,oikl->iode", taps, taps, weight.float()).to(weight.dtype)


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
