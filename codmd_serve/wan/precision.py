"""The precision of the VAE: the requested dtype, and whether the activations of these weights fit in it.

float16 has three more bits than bfloat16, and a range that ends at 65,504. On the embedded VAE it is 67 dB from
float32, where TF32, torch's own choice for float32 convolutions on CUDA, is 69.5 and bfloat16 is 55, which bands.
"""

import logging

import torch
from torch import Tensor

from codmd_serve.config import DTYPE_CHOICES
from codmd_serve.errors import ConfigError
from codmd_serve.wan.vae import StreamingDecoder

HEADROOM = 4.0  # between the largest activation at load and the end of the range: another prompt may need more
LEAST_PSNR_DB = 45.0  # below, something else than rounding is wrong

logger = logging.getLogger(__name__)


def choose_vae_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; auto is float16 on CUDA and float32 elsewhere.

    Raises:
        ConfigError: not one of the names, or float16 on a CPU, whose convolutions do not take it.
    """
    if name not in DTYPE_CHOICES:
        raise ConfigError(f"vae_dtype must be one of {', '.join(DTYPE_CHOICES)}, got {name!r}")
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ConfigError("vae_dtype float16 needs a CUDA device; on this one say auto, float32 or bfloat16")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


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
        decoder.problem = f"VAE in float32: its activations reach {largest:.3g}, float16 is taken up to {limit:.3g}"
        logger.warning("vae_dtype=float32 reason=%r", decoder.problem)
        return
    weights = [parameter.data for parameter in decoder.parameters()]
    decoder.set_dtype(dtype)
    psnr_db = psnr(next(decoder.frames(first)), want)
    if decoder.has_overflowed() or psnr_db < LEAST_PSNR_DB:
        with torch.inference_mode(False):
            for parameter, data in zip(decoder.parameters(), weights, strict=True):
                parameter.data = data
        decoder.set_dtype(torch.float32)
        decoder.problem = f"VAE in float32: float16 is {psnr_db:.1f} dB from it, {LEAST_PSNR_DB:g} are wanted"
        logger.warning("vae_dtype=float32 reason=%r", decoder.problem)
        return
    logger.info("vae_dtype=float16 largest_activation=%.3g psnr_db=%.1f", largest, psnr_db)


def psnr(got: Tensor, want: Tensor) -> float:
    """Return the PSNR of two tensors of uint8 pixels in dB; infinite where they are equal."""
    error = float((got.float() - want.float()).square().mean())
    return float("inf") if error == 0 else float(10 * torch.log10(torch.tensor(255.0**2 / error)))
