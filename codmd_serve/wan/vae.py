"""Latents to pixels, chunk by chunk: the first frame is out while the last one is still latent.

Legend: B batch, C channels, F latent frames, T pixel frames, H and W rows and columns. Knows nothing of files.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor


def latent_shape(vae: Any, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
    """Latent (C, F, H, W) of a video of height x width pixels and num_frames = k * temporal factor + 1 frames."""
    frames = (num_frames - 1) // vae.config.scale_factor_temporal + 1
    factor = vae.config.scale_factor_spatial
    return vae.config.z_dim, frames, height // factor, width // factor


def decode_frames(vae: Any, latents_BCFHW: Tensor) -> Iterator[Tensor]:
    """Decode normalised latents to uint8 frames, one latent frame at a time.

    Args:
        vae: an AutoencoderKLWan. Its own tiling and slicing switches are not consulted.
        latents_BCFHW: (B, C, F, H, W) as the transformer sees them, (z - latents_mean) / latents_std.

    Yields:
        (B, T, height, width, 3) uint8 on the VAE's device; T is 1 for the first chunk and the temporal factor after
        it. Concatenated over T they equal clamp and round of `vae.decode` on the whole, bit for bit.

    Source: diffusers, AutoencoderKLWan._decode; the feature cache belongs to the call here and not to the module, so
    that an abandoned decode leaves nothing behind.
    """
    mean_C, std_C = (
        torch.tensor(vae.config[name], dtype=vae.dtype, device=vae.device).reshape(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        hidden = vae.post_quant_conv(latents_BCFHW.to(vae.device, vae.dtype) * std_C + mean_C)
    cache: list[Tensor | None] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    for frame in range(hidden.shape[2]):
        # Not around the yield: the caller's code would run with gradients switched off.
        with torch.no_grad():
            chunk = vae.decoder(hidden[:, :, frame : frame + 1], feat_cache=cache, feat_idx=[0], first_chunk=frame == 0)
            if vae.config.patch_size is not None:
                chunk = unpatchify(chunk, patch_size=vae.config.patch_size)
            pixels_BTHWC = to_uint8(chunk)
        yield pixels_BTHWC


def to_uint8(pixels_BCTHW: Tensor) -> Tensor:
    """Pixels in [-1, 1], (B, 3, T, H, W) of any floating dtype, to rounded uint8 of shape (B, T, H, W, 3)."""
    scaled = (pixels_BCTHW.float().clamp(-1.0, 1.0) + 1.0) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
