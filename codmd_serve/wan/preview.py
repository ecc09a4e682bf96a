"""Previews of a video while it is denoised: a linear map from latents to RGB at latent size, no decode.

Legend: N samples, C latent channels, F latent frames, T frames, H and W rows and columns of latents or pixels.
"""

import io
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.files import first_line
from codmd_serve.wan.checkpoint import load_module
from codmd_serve.wan.vae import StreamingDecoder

# One row per latent channel and one constant: R, G and B in [-1, 1].
PreviewMap = tuple[tuple[float, float, float], ...]

SAMPLES_PER_UNKNOWN = 4
LATENT_SIZE = (2, 2, 2)  # of a sample: the first frame is decoded alone, the next one to a group of frames
WEBP = {"quality": 60, "method": 2}

logger = logging.getLogger(__name__)


@torch.inference_mode()
def fit_preview(decoder: StreamingDecoder) -> PreviewMap:
    """Fit the map of a VAE by least squares on decoded random latents, one colour each.

    Flat latents show what each channel does to the colour; a field of independent ones decodes to texture, which fits
    real videos worse (measured on the embedded VAE: 20 levels of RMSE instead of 35).

    Returns:
        (C + 1, 3) numbers, the same for the same weights up to the rounding of the device.
    """
    num_channels = decoder.latents_mean.shape[1]
    num_samples = SAMPLES_PER_UNKNOWN * (num_channels + 1)
    latents_NC = torch.randn(num_samples, num_channels, generator=torch.Generator().manual_seed(0))
    flat_NCFHW = latents_NC[:, :, None, None, None].expand(-1, -1, *LATENT_SIZE)
    frames_NTHWC = torch.cat(list(decoder.frames(flat_NCFHW.to(decoder.latents_mean.device).contiguous())), dim=1)
    colours_NC = frames_NTHWC.double().mean((1, 2, 3)).cpu() / 127.5 - 1.0
    inputs = torch.cat([latents_NC.double(), torch.ones(num_samples, 1, dtype=torch.float64)], dim=1)
    # gelsd: channels that carry nothing would make the problem singular.
    solution = torch.linalg.lstsq(inputs, colours_NC, driver="gelsd").solution
    rows: list[list[float]] = [[round(value, 6) for value in row] for row in solution.tolist()]
    return tuple((row[0], row[1], row[2]) for row in rows)


def preview_map_of_base(folder: Path | str) -> PreviewMap:
    """Fit the map of a base pipeline on the CPU; empty, with a warning, where its VAE cannot be used.

    Args:
        folder: of the pipeline.
    """
    try:
        vae = load_module(AutoencoderKLWan, folder, "vae", torch_dtype=torch.float32)
        return fit_preview(StreamingDecoder(vae.requires_grad_(False).eval()))
    except (CheckpointError, RuntimeError, ValueError, TypeError) as error:
        # Previews are no part of the student: an engine that loads it with another VAE fits them then.
        logger.warning("preview_map=none reason=%r", first_line(error))
        return ()


def preview_frames(x0_pred_BCFHW: Tensor, preview_map: PreviewMap) -> Tensor:
    """Apply the map to the first video of a batch.

    Args:
        x0_pred_BCFHW: normalised latents, as the transformer sees them.
        preview_map: of the VAE, (C + 1, 3).

    Returns:
        (F, H, W, 3) uint8 on the CPU; waits for the device.
    """
    latents_FHWC = x0_pred_BCFHW[0].permute(1, 2, 3, 0)
    weights = torch.tensor(preview_map, dtype=latents_FHWC.dtype, device=latents_FHWC.device)
    rgb = latents_FHWC @ weights[:-1] + weights[-1]
    return rgb.clamp(-1.0, 1.0).add_(1.0).mul_(127.5).round_().to(torch.uint8).cpu()


def animate(frames_FHWC: Tensor, seconds: float) -> bytes:
    """Encode frames as a looping WebP animation.

    Args:
        frames_FHWC: uint8 on the CPU.
        seconds: length of the whole.
    """
    images = [Image.fromarray(frame.numpy()) for frame in frames_FHWC]
    target = io.BytesIO()
    duration_ms = max(1, round(1000 * seconds / len(images)))
    images[0].save(target, "WEBP", save_all=True, append_images=images[1:], duration=duration_ms, loop=0, **WEBP)
    return target.getvalue()
