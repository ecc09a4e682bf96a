"""The VAE of the ShapeWorld pipeline: training on renders, latent statistics; knows nothing of captions' meaning."""

import math

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, unpatchify
from torch import Tensor, nn

from codmd_serve.errors import ConfigError
from distill.pretrain.config import VaeConfig
from distill.pretrain.stage import StageOptions, autocast, load_weights, run_stage
from distill.worlds.shapeworld.captions import sample_scene
from distill.worlds.shapeworld.render import sample_clip
from distill.worlds.shapeworld.schema import NATIVE_NUM_FRAMES

IMAGES_PER_CLIP = 4
INITIAL_LOGVAR = -10.0


def build_vae(config: VaeConfig) -> AutoencoderKLWan:
    """A fresh AutoencoderKLWan: pixels in patches of 2, then two halvings of space and of time."""
    levels = len(config.dim_mult) - 1
    return AutoencoderKLWan(
        base_dim=config.base_dim,
        decoder_base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=[True] * levels,
        is_residual=True,
        in_channels=3 * config.patch_size**2,
        out_channels=3 * config.patch_size**2,
        patch_size=config.patch_size,
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
        scale_factor_temporal=2**levels,
        scale_factor_spatial=config.patch_size * 2**levels,
    )


def _initialise(vae: AutoencoderKLWan) -> None:
    """Let the image through from the first step on: Kaiming weights, silent residual branches, a sure posterior.

    With the classes' defaults an image moves the latents by .025 while the posterior adds noise of 1, so that the
    decoder spends its first hundreds of steps learning to ignore its input: PSNR stays at that of a constant.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
    nn.init.constant_(vae.quant_conv.bias[vae.config.z_dim :], INITIAL_LOGVAR)


def to_pixels(clips: np.ndarray) -> Tensor:
    """uint8 (B, T, H, W, 3) to float32 (B, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def draw_clips(rng: np.random.Generator, num_frames: int, batch_size: int) -> Tensor:
    """Draw training clips or images of the training captions.

    Returns:
        (batch_size, 3, num_frames, 96, 96) float32 in [-1, 1]; images come several to a clip, short clips from a
        random moment of a full one.
    """
    per_clip = IMAGES_PER_CLIP if num_frames == 1 else 1
    pieces: list[np.ndarray] = []
    while len(pieces) < batch_size:
        clip = sample_clip(sample_scene(rng), rng)
        for _ in range(min(per_clip, batch_size - len(pieces))):
            start = int(rng.integers(NATIVE_NUM_FRAMES - num_frames + 1))
            pieces.append(clip[start : start + num_frames])
    return to_pixels(np.stack(pieces))


def train_vae(config: VaeConfig, seed: int, options: StageOptions, start: str = "") -> AutoencoderKLWan | None:
    """Train, or go on training, the VAE, from the weights of the pipeline `start` if named; None when told to stop.

    Raises:
        CheckpointError: `start` has no VAE of this layout.
        ConfigError: `decoder_only` without `start`.
    """
    torch.manual_seed(seed)
    vae = build_vae(config).to(options.device)
    _initialise(vae)
    if start:
        load_weights(vae, start, "vae")
    if not config.phases:
        return vae.eval().requires_grad_(False)
    if config.decoder_only:
        if not start:
            raise ConfigError("decoder_only keeps a trained encoder: name its pipeline with --start")
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    ends = np.cumsum([phase.num_steps for phase in config.phases])

    def compute_loss(step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        # By progress and not by step: a run that a time budget shortens must still end on full-length clips.
        phase = config.phases[int(np.searchsorted(ends, round(progress * ends[-1]), side="right"))]
        rng = np.random.default_rng([seed, 1, step])
        pixels = draw_clips(rng, phase.num_frames, phase.batch_size).to(options.device)
        with autocast(options):
            posterior = vae.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32)).to(options.device)
            # Not vae.decode: it clamps, and a clamped pixel has no gradient to come back by.
            output = decode_unclamped(vae, mean + torch.exp(0.5 * logvar) * noise).float()
        error = output - pixels
        squared = error.square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        loss = error.abs().mean() + 2.0 * squared + config.kl_weight * kl
        return loss, {"psnr_db": -10 * torch.log10(squared.detach() / 4), "kl": kl.detach()}

    trained = run_stage("vae", vae, int(ends[-1]), config.learning_rate, compute_loss, options)
    return None if trained is None else vae.eval().requires_grad_(False)


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`vae.decode` of raw latents (B, z, F, h, w) without its clamp to [-1, 1], differentiable."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for frame in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(
                hidden[:, :, frame : frame + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=frame == 0,
            )
        )
    vae.clear_cache()
    pixels: Tensor = unpatchify(torch.cat(chunks, dim=2), patch_size=vae.config.patch_size)
    return pixels


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays of one shape, in dB; infinite when equal."""
    squared = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return math.inf if squared == 0 else 10 * math.log10(255.0**2 / squared)
