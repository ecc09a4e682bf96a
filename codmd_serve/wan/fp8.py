"""Lossy fp8 matrix products with one scale per row of weights and activations; knows no sampler.

e4m3 has four significant bits. The relative rounding error is at most 1/16, and .026 in the root mean square, at any
magnitude, so scaling a row into range is enough. Both factors are rounded, so a product of independent numbers is off
by .037. Weights are rounded once, activations in every call.

Not quantized: embedders and head, because every later number depends on them; the modulation, which is float32; keys
and values of the prompt, which are computed once per prompt.

Legend: N tokens in all videos of a batch, I and O inputs and outputs of a layer.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from codmd_serve.config import QUANTIZATIONS
from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line
from codmd_serve.wan.transformer import FewStepTransformer

FP8 = torch.float8_e4m3fn
HIGHEST = torch.finfo(FP8).max
SMALLEST_SCALE = 1e-12  # rows of zeros; below, the quotient would leave the range
MIN_CAPABILITY = (8, 9)  # Ada and Hopper have the instructions
DIVISOR = 16  # of widths, for the kernels of torch._scaled_mm
logger = logging.getLogger(__name__)

LAYERS = ("qkv", "attn_out", "cross_q", "cross_out", "ffn_in", "ffn_out")


def check_quantization(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an unknown quantization, or one that `device` has no instructions for.

    Args:
        name: none, fp8, or fp8-emulated: the same rounding on a CPU, without its speed.
        device, dtype: of the network.

    Raises:
        ConfigError: says what it takes and what is there.
    """
    if name not in QUANTIZATIONS:
        raise ConfigError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {name!r}")
    if name == "none":
        return
    least = ".".join(map(str, MIN_CAPABILITY))
    if name == "fp8-emulated":
        if device.type != "cpu":
            raise ConfigError(f"quantization fp8-emulated is for CPUs, got {device}: say fp8")
        return
    if device.type != "cuda":
        raise ConfigError(f"quantization fp8 needs a CUDA device of compute capability {least} or higher, got {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ConfigError(
            f"quantization fp8 needs a CUDA device of compute capability {least} or higher, "
            f"got {torch.cuda.get_device_name(device)} of {'.'.join(map(str, capability))}"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"quantization fp8 gives bfloat16, got {str(dtype).removeprefix('torch.')}: leave --dtype out"
        )


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to e4m3.

    Args:
        values: (N, I), any floating dtype. A row with a number that is not finite becomes NaN, not something plausible.

    Returns:
        (N, I) in float8_e4m3fn, and (N, 1) float32 that it has to be multiplied by.
    """
    wide = values.float()
    scale = (wide.abs().amax(-1, keepdim=True) / HIGHEST).clamp(min=SMALLEST_SCALE)
    return (wide / scale).to(FP8), scale


def quantize_tensor(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round a whole tensor to e4m3 with one scale: (N, I) in float8_e4m3fn, and () float32."""
    wide = values.float()
    scale = (wide.abs().amax() / HIGHEST).clamp(min=SMALLEST_SCALE)
    return (wide / scale).to(FP8), scale


def row_scales_problem(device: torch.device) -> str:
    """Return why products with a scale per row do not run on a device, in one line; empty when they do."""
    if device.type == "cpu":
        return ""
    try:
        rows, scale = quantize_rows(torch.ones(DIVISOR, DIVISOR, device=device))
        scaled_product(rows, scale, rows, scale.t(), torch.zeros(DIVISOR, device=device, dtype=torch.bfloat16))
    except Exception as error:  # of a driver, a library or a card without them
        return first_line(error)
    return ""


class Float8Linear(nn.Module):
    """A linear layer with an e4m3 weight, one scale per output; its input is quantized row by row on the fly.

    Args:
        source: in bfloat16, with a bias; both sides divisible by 16.
        per_tensor: one scale for the weight and one for the input instead, where a device has no others.

    Raises:
        ConfigError: sides that the kernels cannot take.
    """

    # (O, I) float8_e4m3fn, (1, O) or () float32, (O,) bfloat16
    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, source: nn.Linear, per_tensor: bool = False) -> None:
        super().__init__()
        self.quantize = quantize_tensor if per_tensor else quantize_rows
        if any(size % DIVISOR for size in source.weight.shape):
            sizes = " and ".join(map(str, source.weight.shape))
            raise ConfigError(f"quantization fp8 needs layers whose sides are multiples of {DIVISOR}, got {sizes}")
        weight, scale = self.quantize(source.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale if per_tensor else scale.t().contiguous())
        self.register_buffer("bias", source.bias.detach())

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., I) to (..., O), bfloat16 in and out, with the device's fast accumulator."""
        rows, scale = self.quantize(features.reshape(-1, features.shape[-1]))
        out = scaled_product(rows, scale, self.weight, self.scale, self.bias)
        return out.reshape(*features.shape[:-1], -1)


def scaled_product(rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """Return (N, I) times (O, I) transposed, both e4m3 with row scales or one for all, plus the bias, in its dtype.

    On a CPU the rounded factors are multiplied in float32: torch 2.11 has no kernel with a scale per row there.
    """
    if rows.device.type == "cpu":
        product = rows.float() @ weight.float().t()
        return (product * scale * weight_scale + bias.float()).to(bias.dtype)
    return device_product(rows, scale, weight, weight_scale, bias)


def device_product(rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """Compute `scaled_product` in one kernel of the device."""
    return torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale,
        bias=bias,
        out_dtype=bias.dtype,
        use_fast_accum=True,
    )


@torch.no_grad()
def quantize_blocks(transformer: FewStepTransformer) -> None:
    """Replace the large layers of every block by `Float8Linear`, one at a time, so that at most one layer exists twice.

    Where the device has no products with a scale per row, each tensor has one scale, and `problem` says so.

    Raises:
        ConfigError: a network whose widths are no multiples of 16.
    """
    problem = row_scales_problem(transformer.device)
    if problem:
        said = f"fp8 with one scale per tensor, which is less exact: {problem}"
        transformer.problem = "; ".join(filter(None, (transformer.problem, said)))
        logger.warning("fp8=per_tensor reason=%r", problem)
    for block in transformer.blocks:
        for name in LAYERS:
            source: Any = getattr(block, name)
            setattr(block, name, Float8Linear(source, per_tensor=bool(problem)))
    transformer.prefers_compiled = True
