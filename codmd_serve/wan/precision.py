"""The precision of the VAE: the requested dtype, and whether these weights fit in it; on a CPU what is faster.

float16 has three more bits than bfloat16, and a range that ends at 65,504. On the embedded VAE it is 67 dB from
float32, where TF32, torch's own choice for float32 convolutions on CUDA, is 69.5 and bfloat16 is 55, which bands.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from codmd_serve.config import DTYPE_CHOICES
from codmd_serve.errors import ConfigError
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan.cpu_dtype import least_times_s
from codmd_serve.wan.vae import StreamingDecoder

# Of bfloat16 on a CPU, where the last convolution stays float32; the embedded VAE has 58.
LEAST_CPU_PSNR_DB = 50.0
MAX_TIME_RATIO = 0.9  # of the time in float32
MIN_RACED_WEIGHTS = 500_000  # a smaller one waits for calls, not for products
NUM_LATENTS_RACED = 2
HEADROOM = 4.0  # between the largest activation at load and the end of the range: another prompt may need more
LEAST_PSNR_DB = 45.0  # below, something else than rounding is wrong

logger = logging.getLogger(__name__)


def choose_vae_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of a name; auto is float16 on CUDA, and None, to be measured, on a CPU.

    Raises:
        ConfigError: not one of the names, or float16 on a CPU, whose convolutions do not take it.
    """
    if name not in DTYPE_CHOICES:
        raise ConfigError(f"vae_dtype must be one of {', '.join(DTYPE_CHOICES)}, got {name!r}")
    if name == "auto":
        return torch.float16 if device.type == "cuda" else None
    if name == "float16" and device.type == "cpu":
        raise ConfigError("vae_dtype float16 needs a CUDA device; on this one say auto, float32 or bfloat16")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


@torch.inference_mode()
def race_dtype(decoder: StreamingDecoder, latents_BCFHW: Callable[[], Tensor], verdicts: Verdicts) -> None:
    """Cast a float32 decoder on a CPU to bfloat16 where that is faster and near enough.

    Args:
        decoder: in float32.
        latents_BCFHW: makes real ones, where they are needed; the first two frames are decoded.
        verdicts: of earlier loads.
    """
    if sum(parameter.numel() for parameter in decoder.parameters()) < MIN_RACED_WEIGHTS:
        return
    known = verdicts.get("vae_dtype", ("float32", "bfloat16"))
    if known is not None:
        if known == "bfloat16":
            decoder.set_dtype(torch.bfloat16)
        return
    first = latents_BCFHW()[:, :, :NUM_LATENTS_RACED]

    def run() -> Tensor:
        return next(decoder.frames(first))

    want = run()
    (wide_s,) = least_times_s([run])
    weights = [parameter.data for parameter in decoder.parameters()]
    decoder.set_dtype(torch.bfloat16)
    psnr_db = psnr(run(), want)
    (narrow_s,) = least_times_s([run])
    logger.info("vae race: float32_ms=%.1f bfloat16_ms=%.1f psnr_db=%.1f", 1e3 * wide_s, 1e3 * narrow_s, psnr_db)
    if narrow_s > MAX_TIME_RATIO * wide_s or psnr_db < LEAST_CPU_PSNR_DB:
        _restore(decoder, weights)
    verdicts.put("vae_dtype", str(decoder.dtype).removeprefix("torch."))


def _restore(decoder: StreamingDecoder, weights: list[Tensor]) -> None:
    """Give a decoder its float32 weights back."""
    with torch.inference_mode(False):
        for parameter, data in zip(decoder.parameters(), weights, strict=True):
            parameter.data = data
    decoder.set_dtype(torch.float32)


@torch.inference_mode()
def fit_dtype(decoder: StreamingDecoder, dtype: torch.dtype, latents_BCFHW: Tensor) -> None:
    """Cast a float32 decoder to `dtype` if the first chunk of real latents fits; else set `decoder.problem`.

    Args:
        decoder: in float32.
        dtype: float16 is looked at; bfloat16 has the range of float32 and is taken as it is.
        latents_BCFHW: what the decoder will see.
    """
    if dtype == decoder.dtype:
        return
    if dtype != torch.float16:
        decoder.set_dtype(dtype)
        return
    first = latents_BCFHW[:, :, : decoder.max_chunk]
    limit = torch.finfo(dtype).max / HEADROOM
    largest, want = decoder.largest_activation(first)
    if not largest <= limit:
        said = f"VAE in float32: its activations reach {largest:.3g}, float16 is taken up to {limit:.3g}"
        decoder.problem = joined(decoder.problem, said)
        logger.warning("vae_dtype=float32 reason=%r", said)
        return
    weights = [parameter.data for parameter in decoder.parameters()]
    decoder.set_dtype(dtype)
    psnr_db = psnr(next(decoder.frames(first)), want)
    if decoder.has_overflowed() or psnr_db < LEAST_PSNR_DB:
        _restore(decoder, weights)
        said = f"VAE in float32: float16 is {psnr_db:.1f} dB from it, {LEAST_PSNR_DB:g} are wanted"
        decoder.problem = joined(decoder.problem, said)
        logger.warning("vae_dtype=float32 reason=%r", said)
        return
    logger.info("vae_dtype=float16 largest_activation=%.3g psnr_db=%.1f", largest, psnr_db)


def joined(*problems: str) -> str:
    """Return what several parts say of their fallbacks as one text for /health; what is said twice stands once."""
    said = [part for problem in problems for part in problem.split("; ") if part]
    return "; ".join(dict.fromkeys(said))


def psnr(got: Tensor, want: Tensor) -> float:
    """Return the PSNR of two tensors of uint8 pixels in dB; infinite where they are equal."""
    error = float((got.float() - want.float()).square().mean())
    return float("inf") if error == 0 else float(10 * torch.log10(torch.tensor(255.0**2 / error)))
